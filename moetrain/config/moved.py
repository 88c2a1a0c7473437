"""Fields that have moved to another table, and their old spellings, which are understood for one version more."""

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from moetrain.config.errors import require

logger = logging.getLogger(__name__)

_SAME_NAME = {
    "router": ("score", "renormalise", "weight_scale", "num_groups", "groups_kept", "group_rule"),
    "balance": ("z_loss_coef", "loss_free", "bias_rate"),
    "dispatch": ("capacity_factor", "capacity_by", "pad_to_capacity", "rounding", "tile"),
}
MOVED: MappingProxyType[str, str] = MappingProxyType(
    {f"moe.{name}": f"{table}.{name}" for table, names in _SAME_NAME.items() for name in names}
    | {
        "moe.balance_scope": "balance.scope",
        "moe.balance_coef": "balance.coef",
        "moe.dispatch_pieces": "dispatch.pieces",
    }
)
_SHOWN = 4  # old spellings that a hint names


def respelled(values: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Nested ``values`` with every moved field where it is now, and the old spellings that they had.

    Args:
        values: tables of fields; they are not changed.
        source: where they are from, for the error.

    Raises:
        ValueError: a field is given in both spellings.
    """
    found = [old for old in MOVED if _holds(values, old)]
    if not found:
        return dict(values), found
    joined = {key: dict(table) if isinstance(table, Mapping) else table for key, table in values.items()}
    for old in found:
        new = MOVED[old]
        require(not _holds(values, new), both_spellings(old, source))
        (old_table, old_name), (table, name) = old.split("."), new.split(".")
        value = joined[old_table].pop(old_name)
        if isinstance(place := joined.setdefault(table, {}), dict):  # what is no table is refused where it is read
            place[name] = value
    return joined, found


def both_spellings(old: str, source: str) -> str:
    """The sentence that refuses a field given twice in ``source``, once as ``old``."""
    return f"{source} gives both {old} and {MOVED[old]}, the old and the new spelling of one field; keep {MOVED[old]}"


def hint(spellings: Sequence[str], source: str = "") -> None:
    """Say, as a warning in the log, which old ``spellings`` the user should change; nothing where there are none."""
    if spellings:
        moved = ", ".join(f"{old} is now {MOVED[old]}" for old in spellings[:_SHOWN])
        if more := spellings[_SHOWN:]:
            moved += f", and {len(more)} more have moved (docs/configuration.md has the list)"
        works = "the old spelling works" if len(spellings) == 1 else "the old spellings work"
        logger.warning("%s%s; %s in this version", f"{source}: " if source else "", moved, works)


def _holds(values: Mapping[str, Any], name: str) -> bool:
    table, field = name.split(".")
    return isinstance(values.get(table), Mapping) and field in values[table]
