"""Values of fields, read from text or from plain data, and what a wrong name or value is told."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

from moetrain.config.errors import EXAMPLES, nearest, require, require_type
from moetrain.config.moved import MOVED
from moetrain.config.options import OWN_OPTIONS, RUN, dashed, groups, is_optional, options, without_none

_SHOWN = 4  # fields that a suggestion names


def checked(name: str, kind: Any, value: Any) -> Any:
    """``value`` as field type ``kind``; raises ``TypeError`` with the field's name otherwise."""
    if is_optional(kind):
        return None if value in (None, "none") else checked(name, without_none(kind), value)
    if get_origin(kind) is Literal:
        require_type(name, value, str)
        return value
    if get_origin(kind) is dict:
        require_type(name, value, dict)
        return {str(key): checked(f"{name}[{key!r}]", float, item) for key, item in value.items()}
    if kind is Path:
        if not isinstance(value, Path):
            require_type(name, value, str)
            require(value != "", f"{name} must name a folder, got ''; write for example --{dashed(name)} runs/mine")
        return Path(value)
    require_type(name, value, kind)
    if kind is int:
        require(abs(value) < 2**63, f"{name} must fit 64 bits, got {value}; choose a smaller number")
    if kind is float:
        require(math.isfinite(value), f"{name} must be a finite number, got {value}; write it in digits")
        return float(value)
    return value


def from_text(name: str, kind: Any, text: str) -> Any:
    """``text`` of the command line as field type ``kind``."""
    if is_optional(kind):
        return None if text == "none" else from_text(name, without_none(kind), text)
    if kind is bool:
        require(text in ("true", "false"), f"{name} must be true or false, got {text!r}; write --{dashed(name)} true")
        return text == "true"
    if get_origin(kind) is dict:
        pairs = [part.partition("=") for part in text.split(",") if part]
        for key, equals, _ in pairs:
            require(
                bool(key and equals), f"{name} must be NAME=NUMBER,..., got {text!r}; write --{dashed(name)} a=1,b=2"
            )
        twice = next((key for idx, (key, _, _) in enumerate(pairs) if key in [pair[0] for pair in pairs[:idx]]), None)
        require(twice is None, f"{name} names {twice!r} twice, got {text!r}; keep one of them")
        return {key: from_text(f"{name}[{key!r}]", float, value) for key, _, value in pairs}
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            raise TypeError(f"{name} must be {kind.__name__}, got {text!r}; write {EXAMPLES[kind]}") from None
        return checked(name, kind, number)
    return checked(name, kind, text)


def explained(name: str, read: Callable[[str, Any, Any], Any], kind: Any, value: Any) -> Any:
    """``read(name, kind, value)``; an error ends with what the field is."""
    try:
        return read(name, kind, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} ({name}: {options()[name].about.text})") from None


def suggest_key(name: str, value: object = None) -> str:
    """The cure for an unknown key: the table, or the fields that may be meant, and what one alone is."""
    table, _, leaf = name.rpartition(".")
    if name in options():  # its dot is part of the key, so that no table is opened
        return f"write {name} without quotes, or {leaf} below [{table}]"
    if isinstance(value, Mapping) and (near := nearest(leaf, groups().keys() - {RUN})) is not None:
        return f"did you mean the table [{near}]?"
    return _suggested(_meant(name, [*options()]), repr)


def suggest_option(name: str) -> str:
    """The same for an option of the command line, given without its dashes and with underscores."""
    return _suggested(_meant(name, [*options(), *OWN_OPTIONS]), lambda field: f"--{dashed(field)}")


def _meant(name: str, known: list[str]) -> list[str]:
    """Fields of that name in any table, else of a name with its words in it, else the one spelled most like it.

    >>> [_meant(name, list(options())) for name in ("data.top_k", "moe.topk", "moe.balance_coeff", "x.learning_rate")]
    [['moe.top_k'], ['moe.top_k'], ['balance.coef'], []]
    >>> _meant("mesh.dp", list(options()))
    ['mesh.dp_replicate', 'mesh.dp_shard']
    """
    leaf = name.rpartition(".")[2]
    words = set(leaf.split("_"))
    last = {field: field.rpartition(".")[2] for field in known}
    if same := [field for field in known if last[field] == leaf]:
        return same
    if with_words := [field for field in known if words <= set(last[field].split("_"))]:
        return with_words
    if near := nearest(name, [*known, *MOVED], cutoff=0.8):
        return [MOVED.get(near, near)]
    near = nearest(leaf, last.values(), cutoff=0.6)
    return [field for field in known if last[field] == near]


def _suggested(fields: list[str], spelled: Callable[[str], str]) -> str:
    if not fields:
        return "see --help for all of them"
    if len(fields) > 1:
        *others, last = map(spelled, fields[:_SHOWN])
        return f"did you mean {', '.join(others)} or {last}?"
    about = options()[fields[0]].about.text if fields[0] in options() else OWN_OPTIONS[fields[0]][1]
    return f"did you mean {spelled(fields[0])}? {about}"
