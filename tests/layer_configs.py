"""The tables of an MoE layer from fields by name, for tests that name a few of them."""

from dataclasses import fields
from typing import Any

from moetrain.config import BalanceConfig, DispatchConfig, MoEConfig, MoELayerConfig, RouterConfig

TABLES = {"moe": MoEConfig, "router": RouterConfig, "balance": BalanceConfig, "dispatch": DispatchConfig}


def layer_tables(**values: object) -> dict[str, Any]:
    """One table of each kind by its name; a field may be called by its table as well (``balance_scope``)."""
    given: dict[str, dict[str, object]] = {table: {} for table in TABLES}
    known = {item.name: table for table, kind in TABLES.items() for item in fields(kind)}
    for name, value in values.items():
        table, _, field = name.partition("_")
        if name in known:
            given[known[name]][name] = value
        else:
            given[table][field] = value
    return {table: kind(**given[table]) for table, kind in TABLES.items()}


def layer_config(**values: object) -> MoELayerConfig:
    return MoELayerConfig(**layer_tables(**values))
