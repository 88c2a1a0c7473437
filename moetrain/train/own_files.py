"""Which files in a run's folder a run has written: those alone are replaced or removed.

A run's folder may be a project of the user's, with a configuration written by hand, results of other programs and
models of its own. Checkpoints are told by ``moetrain.checkpoint.names``.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

_STAMP = "# Written by a run, which replaces it: copy it to change it. SHA-256 of the rest: {digest}\n"
_STAMPED = re.compile(re.escape(_STAMP).replace(r"\{digest\}", "([0-9a-f]{64})"))
_TABLES = frozenset({"model", "moe", "mesh", "data", "optim", "train", "checkpoint"})  # of every version


def stamped(config: str) -> str:
    """A configuration as a run writes it: under a line by which it is known again as long as nobody changes it."""
    return _STAMP.format(digest=_digest(config)) + config


def is_runs_config(path: Path) -> bool:
    """Whether a run wrote this ``config.toml``, and it was not changed since.

    Runs of version 0.1.0 set no stamp. Theirs name every table and have no comment, and stand beside the metrics that
    such a run began before anything else; who copies one to change it has no such metrics there.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if found := _STAMPED.match(text):
        return found[1] == _digest(text[found.end() :])
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    is_whole = tables.keys() >= _TABLES | {"seed", "run_dir"} and not re.search(r"^\s*#", text, re.MULTILINE)
    return is_whole and path.with_name("metrics.jsonl").is_file()


def is_runs_metrics(path: Path) -> bool:
    """Whether a run wrote this ``metrics.jsonl``: it is empty, or begins with the record of a step, be it cut short."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    is_cut_short = first.startswith('{"step": ') and not first.endswith("\n")
    return not first or is_cut_short or {"step", "num_loss_tokens"} <= _object(first).keys()


def is_runs_summary(path: Path) -> bool:
    """Whether a run wrote this ``summary.json``: it says with which moetrain."""
    versions = _object(path.read_text(encoding="utf-8", errors="replace")).get("versions")
    return isinstance(versions, Mapping) and "moetrain" in versions


WRITTEN: MappingProxyType[str, Callable[[Path], bool]] = MappingProxyType(
    {"config.toml": is_runs_config, "metrics.jsonl": is_runs_metrics, "summary.json": is_runs_summary}
)


def strangers(folder: Path) -> list[str]:
    """Names that a run would replace in ``folder``, of what no run has written, or what was changed since."""
    return [name for name, is_ours in WRITTEN.items() if _exists(folder / name) and not _is(is_ours, folder / name)]


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is(ours: Callable[[Path], bool], path: Path) -> bool:
    return path.is_file() and ours(path)


def _object(text: str) -> Mapping[str, Any]:
    """The JSON object in ``text``; an empty one where there is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
