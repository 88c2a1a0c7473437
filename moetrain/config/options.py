"""Every field of a run as an option: its dotted name, type, default, and what its dataclass says about it."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin

from moetrain.config.errors import require_one_of
from moetrain.config.fields import About, about_of, choices_of
from moetrain.config.presets import PRESETS
from moetrain.config.run import RunConfig

RUN = "run"  # the group of what stands in no table
OWN_OPTIONS = {
    "preset": ("NAME", f"Where to start from: {', '.join(PRESETS)}."),
    "config": ("FILE", "TOML file laid over the preset, with the fields below; options have the last word."),
    "steps": ("INT", "Short for --train.steps."),
    "from": (
        "RUN[@STEP]",
        "Short for --start.checkpoint; without --preset and --config, options are laid over that run's configuration.",
    ),
    "profile": ("", "Short for --sequence.costs measured."),
}
_INLINE = 44  # characters of choices that are listed in place of a type
_WIDTHS = (60, 120)


@dataclass(frozen=True, slots=True)
class Option:
    """One field."""

    name: str  # as "moe.top_k"
    kind: Any
    default: Any
    about: About

    @property
    def group(self) -> str:
        """Its table, or ``RUN``.

        >>> [options()[name].group for name in ("moe.top_k", "seed")]
        ['moe', 'run']
        """
        return self.name.rpartition(".")[0] or RUN

    @property
    def choices(self) -> tuple[str, ...]:
        """Its legal values, where they are listed."""
        return choices_of(self.kind)

    @property
    def kind_text(self) -> str:
        """Its type in one word, or its choices."""
        return _kind_text(self.kind)

    @property
    def legal(self) -> str:
        """Unit and legal values; empty where the type says it all.

        >>> options()["moe.top_k"].legal
        'experts, at least 1'
        """
        listed = f"one of {', '.join(self.choices)}" if self.choices and self.kind_text == "NAME" else ""
        bounds = self.about.bounds
        if get_origin(self.kind) is dict and bounds:
            bounds = f"each {bounds}"
        return ", ".join(part for part in (self.about.unit, bounds, listed) if part)

    @property
    def facts(self) -> str:
        """The same and the default.

        >>> options()["moe.top_k"].facts
        'experts, at least 1; default 4'
        """
        return f"{self.legal}; default {self.default_text}" if self.legal else f"default {self.default_text}"

    @property
    def default_text(self) -> str:
        """The default as it is written."""
        if self.default is None or self.default == {}:
            return "none"
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


@cache
def options() -> Mapping[str, Option]:
    """Every field by its dotted name, in the order of the tables."""
    return MappingProxyType({option.name: option for option in _options_of(RunConfig(), "")})


def groups() -> dict[str, str]:
    """The tables, ``RUN`` first, and what each is about."""
    tables = {item.name: item.type for item in fields(RunConfig) if is_dataclass(item.type)}
    return {RUN: _first_line(RunConfig)} | {name: _first_line(table) for name, table in tables.items()}


def options_help(group: str | None = None, *, width: int = 80) -> str:
    """What ``--help`` says of one group, or of all.

    Args:
        group: See ``groups``.
        width: Columns of the terminal; lines are between 60 and 120.

    Raises:
        ValueError: no such group; all are listed.
    """
    if group is not None:
        require_one_of("--help", group, groups())
    columns = min(max(width, _WIDTHS[0]), _WIDTHS[1])
    shown = groups() if group is None else {group: groups()[group]}
    blocks = ["\n".join(_help_of_group(name, text, columns)) for name, text in shown.items()]
    if group is None:
        blocks.append("\n".join(_wrapped(f"One group: `--help NAME`, NAME one of {', '.join(groups())}.", columns, "")))
    return "\n\n".join(blocks)


def dashed(name: str) -> str:
    """``name`` as it is written on the command line, without its leading dashes.

    >>> dashed("moe.top_k")
    'moe.top-k'
    """
    return name.replace("_", "-")


def is_optional(kind: Any) -> bool:
    """Whether a field of type ``kind`` may be None."""
    return isinstance(kind, UnionType) and type(None) in get_args(kind)


def without_none(kind: Any) -> Any:
    """``kind`` without its None, if it has one."""
    return next(part for part in get_args(kind) if part is not type(None)) if is_optional(kind) else kind


def _options_of(table: Any, prefix: str) -> Iterator[Option]:
    for item in fields(table):
        value = getattr(table, item.name)
        if is_dataclass(value):
            yield from _options_of(value, f"{prefix}{item.name}.")
        else:
            yield Option(f"{prefix}{item.name}", item.type, value, about_of(item))


def _help_of_group(group: str, text: str, columns: int) -> list[str]:
    lines = _wrapped(f"{group}: {text}.", columns, "")
    if group == RUN:
        for name, (kind, meaning) in OWN_OPTIONS.items():
            lines += [f"  --{name} {kind}".rstrip(), *_wrapped(meaning, columns, "      ")]
    for option in options().values():
        if option.group == group:
            lines += _wrapped(f"--{dashed(option.name)} {option.kind_text} ({option.facts})", columns, "  ", "      ")
            lines += _wrapped(option.about.text, columns, "      ")
    return lines


def _wrapped(text: str, columns: int, indent: str, rest: str | None = None) -> list[str]:
    rest = indent if rest is None else rest
    return textwrap.wrap(
        text, columns, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )


def _first_line(table: Any) -> str:
    return str(table.__doc__).partition("\n")[0].rstrip(".")


def _kind_text(kind: Any) -> str:
    if is_optional(kind):
        return f"{_kind_text(without_none(kind))}|none"
    if choices := choices_of(kind):
        joined = "|".join(choices)
        return joined if len(joined) <= _INLINE else "NAME"
    if get_origin(kind) is dict:
        return "NAME=NUMBER,..."
    return {int: "INT", float: "FLOAT", bool: "true|false", Path: "PATH", str: "TEXT"}[kind]
