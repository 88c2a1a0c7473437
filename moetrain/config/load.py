"""A run's configuration from a preset, a TOML file and the command line, in this order; and back to TOML.

Nothing here imports torch, so that a mistake is reported in a fraction of a second. Every value is checked for its
type where it is read, and the whole is validated once, after all three sources are joined.
"""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from moetrain.config.errors import naming, require, require_type
from moetrain.config.moved import MOVED, both_spellings, hint, respelled
from moetrain.config.options import dashed, options
from moetrain.config.presets import preset
from moetrain.config.run import RunConfig
from moetrain.config.sequence import MEASURED
from moetrain.config.values import checked, explained, from_text, suggest_key, suggest_option

FILES_AND_PRESETS = ("preset", "config")
SHORT_OPTIONS: MappingProxyType[str, str] = MappingProxyType({"steps": "train.steps", "from": "start.checkpoint"})
FLAGS: MappingProxyType[str, str] = MappingProxyType({"--profile": f"--sequence.costs={MEASURED}"})  # without a value

Base = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def load_run(args: Sequence[str] = (), *, default_preset: str | None = None, base: Base | None = None) -> RunConfig:
    """The run that command-line options describe.

    ``--preset NAME`` chooses where to start from, ``--config FILE`` a TOML file laid over it (which may itself say
    ``preset = "..."``), and ``--section.field VALUE`` or ``--section.field=VALUE`` has the last word. ``--steps`` is
    short for ``--train.steps``. A boolean option without a value means true. Old spellings of fields that have moved
    are understood, with a hint in the log.

    Args:
        args: The options, without the program's name.
        default_preset: Where to start from if neither the options nor the file choose; the plain defaults if None.
        base: Gives what to start from if neither a preset nor a file is named, from what the options say; both as
            ``to_dict`` gives a run.

    Raises:
        ValueError: an unknown option or key, or a value that the configuration refuses.
        TypeError: a value of the wrong type.
    """
    own, overrides = parse_options(args)
    from_file = read_toml(Path(own["config"]), hints=True) if "config" in own else {}
    chosen = own.get("preset", from_file.pop("preset", None if "config" in own else default_preset))
    under = to_dict(preset(chosen)) if chosen is not None else {}
    if base is not None and not own:
        under = _merge(under, base(overrides))
    return run_from_dict(_merge(_merge(under, from_file), overrides))


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
        ValueError: no such file, no UTF-8, no TOML, or a key that no field has; the nearest one is suggested. A field
            in both its spellings.
        TypeError: a value of another type than the field's.
    """
    with naming("config file", "check the path and who may read it"):
        require(path.exists(), f"config file must exist, got {str(path)!r}; check the path")
        require(not path.is_dir(), f"config file must be a file, got the folder {str(path)!r}; name a file in it")
        require(path.is_file(), f"config file must be a regular file, got {str(path)!r}; copy it to one")
        content = path.read_bytes()
    text = _decoded(content, path)
    try:
        raw = tomllib.loads(text)
    except ValueError as error:
        cure = "correct that line" if "line" in str(error) else "correct it"
        raise ValueError(f"config file {str(path)!r} must be TOML: {error}; {cure}") from error
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
    own: dict[str, str] = {}
    values: dict[str, Any] = {}
    given: dict[str, str] = {}  # by what the options are called now, the spelling that they had
    left = list(args)
    while left:
        word = left.pop(0)
        flag = word.partition("=")[0]
        require(flag not in FLAGS or word == flag, f"{flag} takes no value, got {word!r}; write {flag} alone")
        word = FLAGS.get(word, word)
        require(word.startswith("--") and len(word) > 2, f"expected an option such as --train.steps 300, got {word!r}")
        name, has_value, text = word[2:].partition("=")
        name = name.replace("-", "_")
        name = SHORT_OPTIONS.get(name, name)
        spelled, name = name, MOVED.get(name, name)
        if (before := given.setdefault(name, spelled)) != spelled:
            raise ValueError(both_spellings(before if before in MOVED else spelled, "the command line"))
        if name not in options() and name not in FILES_AND_PRESETS:
            raise ValueError(f"unknown option {word.partition('=')[0]}; {suggest_option(name)}")
        if not has_value:
            if name in options() and options()[name].kind is bool and (not left or left[0].startswith("--")):
                text = "true"
            else:
                require(bool(left), f"option --{dashed(name)} must have a value; write --{dashed(name)} VALUE")
                text = left.pop(0)
        if name in FILES_AND_PRESETS:
            own[name] = text
        else:
            _put(values, name, explained(name, from_text, options()[name].kind, text))
    hint([spelled for name, spelled in given.items() if spelled != name])
    return own, values


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """An instance of dataclass ``cls``; nested dataclasses from nested mappings."""
    hints = get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown key {prefix + name!r}; {suggest_key(prefix + name, value)}")
        kind = hints[name]
        if is_dataclass(kind):
            require(
                isinstance(value, Mapping), f"{prefix}{name} must be a table, got {value!r}; write [{prefix}{name}]"
            )
            made[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            made[name] = explained(f"{prefix}{name}", checked, kind, value)
    return cls(**made)


def _read_table(cls: type, table: Mapping[str, Any], prefix: str, source: str) -> dict[str, Any]:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"unknown key {name!r} in {source}; {suggest_key(name, value)}")
        if is_dataclass(hints[key]):
            require(isinstance(value, dict), f"{name} must be a table, got {value!r}; write [{name}]")
            values[key] = _read_table(hints[key], value, f"{name}.", source)
        else:
            values[key] = explained(name, checked, hints[key], value)
    return values


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()  # of a character cut short, what comes before it is whole
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ValueError(
            f"config file {str(path)!r} must be text in UTF-8, got byte 0x{content[error.start]:02x} at line {line}, "
            f"column {column}; save it as UTF-8"
        ) from error


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


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


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
