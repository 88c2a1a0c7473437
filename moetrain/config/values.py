"""Values of fields, read from text or from plain data, and what a wrong name or value is told."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_origin

from moetrain.config.errors import nearest, require, require_type
from moetrain.config.options import OWN_OPTIONS, dashed, is_optional, options, without_none


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
            example = "a whole number such as 4" if kind is int else "a number such as 0.1"
            raise TypeError(f"{name} must be {kind.__name__}, got {text!r}; write {example}") from None
        return checked(name, kind, number)
    return checked(name, kind, text)


def explained(name: str, read: Callable[[str, Any, Any], Any], kind: Any, value: Any) -> Any:
    """``read(name, kind, value)``; an error ends with what the field is."""
    try:
        return read(name, kind, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} ({name}: {options()[name].about.text})") from None


def suggest_key(name: str) -> str:
    """The cure for an unknown key: the same field in another table, else the nearest spelling, and what that is."""
    near = _nearest_to(name, list(options()))
    return "see --help for all of them" if near is None else f"did you mean {near!r}?{_meaning(near)}"


def suggest_option(name: str) -> str:
    """The same for an option of the command line, given without its dashes and with underscores."""
    near = _nearest_to(name, [*options(), *OWN_OPTIONS])
    return "see --help for all of them" if near is None else f"did you mean --{dashed(near)}?{_meaning(near)}"


def _nearest_to(name: str, known: list[str]) -> str | None:
    leaf = name.rpartition(".")[2]
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]
    if near := same_leaf[0] if same_leaf else nearest(name, known):
        return near
    by_leaf = {candidate.rpartition(".")[2]: candidate for candidate in known}
    return by_leaf.get(nearest(leaf, by_leaf) or "")


def _meaning(name: str) -> str:
    text = options()[name].about.text if name in options() else OWN_OPTIONS[name][1]
    return f" {text}"
