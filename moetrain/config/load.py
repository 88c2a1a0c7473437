"""A run's configuration from a preset, a TOML file and the command line, in this order; and back to TOML.

Nothing here imports torch, so that a mistake is reported in a fraction of a second. Every value is checked for its
type where it is read, and the whole is validated once, after all three sources are joined.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moetrain.config.errors import nearest, require, require_type
from moetrain.config.moved import MOVED, both_spellings, hint, respelled
from moetrain.config.presets import PRESETS, preset
from moetrain.config.run import RunConfig

SHORT_OPTIONS: MappingProxyType[str, str] = MappingProxyType({"steps": "train.steps"})
OWN_OPTIONS = ("preset", "config")


def load_run(args: Sequence[str] = (), *, default_preset: str | None = None) -> RunConfig:
    """The run that command-line options describe.

    ``--preset NAME`` chooses where to start from, ``--config FILE`` a TOML file laid over it (which may itself say
    ``preset = "..."``), and ``--section.field VALUE`` or ``--section.field=VALUE`` has the last word. ``--steps`` is
    short for ``--train.steps``. A boolean option without a value means true. Old spellings of fields that have moved
    are understood, with a hint in the log.

    Args:
        args: The options, without the program's name.
        default_preset: Where to start from if neither the options nor the file choose; the plain defaults if None.

    Raises:
        ValueError: an unknown option or key, or a value that the configuration refuses.
        TypeError: a value of the wrong type.
    """
    own, overrides = parse_options(args)
    from_file = read_toml(Path(own["config"]), hints=True) if "config" in own else {}
    chosen = own.get("preset", from_file.pop("preset", None if "config" in own else default_preset))
    base = to_dict(preset(chosen)) if chosen is not None else {}
    return run_from_dict(_merge(_merge(base, from_file), overrides))


def run_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """A run from nested dictionaries, as ``to_dict`` gives them; what is left out keeps its default.

    Old spellings of fields that have moved are understood: checkpoints written before have them.
    """
    return _build(RunConfig, respelled(values, "the configuration")[0], "")


def to_dict(run: RunConfig) -> dict[str, Any]:
    """``run`` as nested dictionaries of plain values; paths become text, fields that are None are left out."""
    return _plain(run)


def to_toml(run: RunConfig) -> str:
    """``run`` as TOML that ``load_run(["--config", file])`` reads back to an equal run."""
    lines: list[str] = []
    tables: list[tuple[str, dict[str, Any]]] = [("", to_dict(run))]
    while tables:
        name, table = tables.pop(0)
        if name:
            lines += ["", f"[{name}]"]
        for key, value in table.items():
            if isinstance(value, dict) and value:
                tables.append((f"{name}.{key}" if name else key, value))
            elif value != {}:
                lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def read_toml(path: Path, *, hints: bool = False) -> dict[str, Any]:
    """Values of a TOML file, each of the type its field has, under the names that fields have now.

    Args:
        path: of the file.
        hints: whether whoever wrote the file should hear of old spellings in it.

    Raises:
        ValueError: no such file, no TOML, or a key that no field has; the nearest one is suggested. A field in both its
            spellings.
        TypeError: a value of another type than the field's.
    """
    require(path.is_file(), f"config file must exist, got {str(path)!r}; check the path")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {str(path)!r} must be TOML: {error}; correct that line") from error
    chosen = raw.pop("preset", None)
    raw, old_spellings = respelled(raw, str(path))
    if hints:
        hint(old_spellings, str(path))
    values = _read_table(RunConfig, raw, "", str(path))
    if chosen is not None:
        require_type("preset", chosen, str)
        values["preset"] = chosen
    return values


def parse_options(args: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Options split into our own (``preset``, ``config``) and a nested dictionary of field values."""
    kinds = option_types()
    own: dict[str, str] = {}
    values: dict[str, Any] = {}
    given: dict[str, str] = {}  # by what the options are called now, the spelling that they had
    left = list(args)
    while left:
        word = left.pop(0)
        require(word.startswith("--") and len(word) > 2, f"expected an option such as --train.steps 300, got {word!r}")
        name, has_value, text = word[2:].partition("=")
        name = name.replace("-", "_")
        name = SHORT_OPTIONS.get(name, name)
        spelled, name = name, MOVED.get(name, name)
        if (before := given.setdefault(name, spelled)) != spelled:
            raise ValueError(both_spellings(before if before in MOVED else spelled, "the command line"))
        if name not in kinds and name not in OWN_OPTIONS:
            raise ValueError(f"unknown option {word.partition('=')[0]}; {_suggest(name, option=True)}")
        if not has_value:
            if kinds.get(name) is bool and (not left or left[0].startswith("--")):
                text = "true"
            else:
                require(bool(left), f"option --{_dashed(name)} must have a value; write --{_dashed(name)} VALUE")
                text = left.pop(0)
        if name in OWN_OPTIONS:
            own[name] = text
        else:
            _put(values, name, _from_text(name, kinds[name], text))
    hint([spelled for name, spelled in given.items() if spelled != name])
    return own, values


def option_types() -> dict[str, Any]:
    """The type of every field, by dotted name: ``{"moe.top_k": int, ...}``."""
    return _option_types(RunConfig, "")


def options_help() -> str:
    """One line per option with its default, for ``--help``."""
    defaults = _flat(to_dict(RunConfig()), "")
    lines = [
        f"  --preset NAME   one of {', '.join(PRESETS)}",
        "  --config FILE   a TOML file with the fields below, laid over the preset",
        "  --steps N       short for --train.steps",
    ]
    for name, kind in option_types().items():
        lines.append(f"  --{_dashed(name)} {_kind_text(kind)}   (default {defaults.get(name, 'none')})")
    return "\n".join(lines)


def _option_types(cls: type, prefix: str) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        if isinstance(kind, type) and is_dataclass(kind):
            kinds |= _option_types(kind, f"{prefix}{name}.")
        else:
            kinds[f"{prefix}{name}"] = kind
    return kinds


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """An instance of dataclass ``cls``; nested dataclasses from nested mappings."""
    hints = get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown key {prefix + name!r}; {_suggest(prefix + name)}")
        kind = hints[name]
        if is_dataclass(kind):
            require(
                isinstance(value, Mapping), f"{prefix}{name} must be a table, got {value!r}; write [{prefix}{name}]"
            )
            made[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            made[name] = _checked(f"{prefix}{name}", kind, value)
    return cls(**made)


def _read_table(cls: type, table: Mapping[str, Any], prefix: str, source: str) -> dict[str, Any]:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"unknown key {name!r} in {source}; {_suggest(name)}")
        if is_dataclass(hints[key]):
            require(isinstance(value, dict), f"{name} must be a table, got {value!r}; write [{name}]")
            values[key] = _read_table(hints[key], value, f"{name}.", source)
        else:
            values[key] = _checked(name, hints[key], value)
    return values


def _checked(name: str, kind: Any, value: Any) -> Any:
    """``value`` as field type ``kind``; raises ``TypeError`` with the field's name otherwise."""
    if _is_optional(kind):
        return None if value in (None, "none") else _checked(name, _without_none(kind), value)
    if get_origin(kind) is Literal:
        require_type(name, value, str)
        return value
    if get_origin(kind) is dict:
        require_type(name, value, dict)
        return {str(key): _checked(f"{name}[{key!r}]", float, item) for key, item in value.items()}
    if kind is Path:
        if not isinstance(value, Path):
            require_type(name, value, str)
            require(value != "", f"{name} must name a folder, got ''; write for example --{_dashed(name)} runs/mine")
        return Path(value)
    require_type(name, value, kind)
    if kind is int:
        require(abs(value) < 2**63, f"{name} must fit 64 bits, got {value}; choose a smaller number")
    if kind is float:
        require(math.isfinite(value), f"{name} must be a finite number, got {value}; write it in digits")
        return float(value)
    return value


def _from_text(name: str, kind: Any, text: str) -> Any:
    """``text`` of the command line as field type ``kind``."""
    if _is_optional(kind):
        return None if text == "none" else _from_text(name, _without_none(kind), text)
    if kind is bool:
        require(text in ("true", "false"), f"{name} must be true or false, got {text!r}; write --{_dashed(name)} true")
        return text == "true"
    if get_origin(kind) is dict:
        pairs = [part.partition("=") for part in text.split(",") if part]
        for key, equals, _ in pairs:
            require(
                bool(key and equals), f"{name} must be NAME=NUMBER,..., got {text!r}; write --{_dashed(name)} a=1,b=2"
            )
        twice = next((key for idx, (key, _, _) in enumerate(pairs) if key in [pair[0] for pair in pairs[:idx]]), None)
        require(twice is None, f"{name} names {twice!r} twice, got {text!r}; keep one of them")
        return {key: _from_text(f"{name}[{key!r}]", float, value) for key, _, value in pairs}
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            example = "a whole number such as 4" if kind is int else "a number such as 0.1"
            raise TypeError(f"{name} must be {kind.__name__}, got {text!r}; write {example}") from None
        return _checked(name, kind, number)
    return _checked(name, kind, text)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, table by table; domain weights are replaced as a whole."""
    joined = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(joined.get(key), dict) and key != "domain_weights"
        joined[key] = _merge(joined[key], value) if both else value
    return joined


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        pairs = ((item.name, getattr(value, item.name)) for item in fields(value))
        return {name: _plain(part) for name, part in pairs if part is not None}
    if isinstance(value, dict):
        return dict(value)
    return str(value) if isinstance(value, Path) else value


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


def _suggest(name: str, *, option: bool = False) -> str:
    """The cure for an unknown name: the same field in another section, else the nearest spelling."""
    known = [*option_types(), *(OWN_OPTIONS + tuple(SHORT_OPTIONS) if option else ())]
    leaf = name.rpartition(".")[2]
    same_leaf = [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]
    near = same_leaf[0] if same_leaf else nearest(name, known)
    if near is None:
        by_leaf = {candidate.rpartition(".")[2]: candidate for candidate in known}
        near = by_leaf.get(nearest(leaf, by_leaf) or "")
    if near is None:
        return "see --help for all of them"
    return f"did you mean {'--' + _dashed(near) if option else repr(near)}?"


def _is_optional(kind: Any) -> bool:
    return isinstance(kind, UnionType) and type(None) in get_args(kind)


def _without_none(kind: Any) -> Any:
    return next(part for part in get_args(kind) if part is not type(None))


def _kind_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if _is_optional(kind):
        return f"{_kind_text(_without_none(kind))}|none"
    if get_origin(kind) is dict:
        return "NAME=NUMBER,..."
    return {int: "INT", float: "FLOAT", bool: "BOOL", Path: "PATH"}.get(kind, "TEXT")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _toml_key(key: str) -> str:
    plain = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if plain else _toml_string(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _toml_string(value) if isinstance(value, str) else repr(value)


def _toml_string(text: str) -> str:
    """A basic string. JSON's escapes are among TOML's, which wants one more: U+007F is a control character to it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
