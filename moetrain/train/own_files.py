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

from moetrain.placement.trace import is_runs_piece, pieces

_STAMP = "# Written by a run, which replaces it: copy it to change it. SHA-256 of the rest: {digest}\n"
_STAMPED = re.compile(re.escape(_STAMP).replace(r"\{digest\}", "([0-9a-f]{64})"))
_RECORD = b'{"step": '  # the beginning of each line of metrics
PROFILE = "profile.json"
TRACE = "trace"  # a folder of pieces; see moetrain.placement.trace
SUMMARY_DIGEST = "sha256_of_the_rest"
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
    """Whether runs wrote this ``metrics.jsonl``: it is empty, or begins with a step's record and has no strange line.

    Which values a record has is not looked at.
    """
    first, *others = _lines(path.read_bytes()) or [b""]
    if not first or (not others and is_cut_short(first)):
        return True
    return "num_loss_tokens" in _object(first.decode(errors="replace")) and not strange_lines(path)


def strange_lines(metrics: Path) -> list[int]:
    """Numbers, from 1, of the lines of ``metrics.jsonl`` that no run has written, be they damaged."""
    lines = _lines(metrics.read_bytes())
    return [
        number
        for number, line in enumerate(lines, 1)
        if not (is_record(line) or is_lost(line) or (number == len(lines) and is_cut_short(line)))
    ]


def is_record(line: bytes) -> bool:
    """Whether a line is the record of a step or of an evaluation."""
    record = _object(line.decode(errors="replace"))
    return isinstance(record.get("step"), int) and not {"num_loss_tokens", "validation_loss"}.isdisjoint(record)


def is_lost(line: bytes) -> bool:
    """Whether nothing was in a line, or a machine that stopped has left zeros in it."""
    return not line.strip() or b"\0" in line


def is_cut_short(line: bytes) -> bool:
    """Whether this last line is the beginning of a record, and nothing else."""
    if line.endswith(b"\n"):
        return False
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except ValueError:
        return line.startswith(_RECORD) or _RECORD.startswith(line)
    return is_record(line)


def with_digest(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary, or a profile, as a run writes it: known again as long as nobody changes it."""
    return {**summary, SUMMARY_DIGEST: _digest_of(summary)}


def is_runs_summary(path: Path) -> bool:
    """Whether a run wrote this ``summary.json``, and it was not changed since.

    Runs of version 0.1.0 wrote no digest; theirs say with which moetrain.
    """
    summary = dict(_object(path.read_text(encoding="utf-8", errors="replace")))
    if (digest := summary.pop(SUMMARY_DIGEST, None)) is not None:
        return digest == _digest_of(summary)
    versions = summary.get("versions")
    return isinstance(versions, Mapping) and "moetrain" in versions


def is_runs_profile(path: Path) -> bool:
    """Whether a run wrote this ``profile.json``, and it was not changed since."""
    profile = dict(_object(path.read_text(encoding="utf-8", errors="replace")))
    digest = profile.pop(SUMMARY_DIGEST, None)
    return digest is not None and digest == _digest_of(profile)


WRITTEN: MappingProxyType[str, Callable[[Path], bool]] = MappingProxyType(
    {
        "config.toml": is_runs_config,
        "metrics.jsonl": is_runs_metrics,
        "summary.json": is_runs_summary,
        PROFILE: is_runs_profile,
    }
)


def strangers(folder: Path) -> list[str]:
    """Names that a run would replace in ``folder``, of what no run has written, or what was changed since."""
    named = [(folder / name, is_ours) for name, is_ours in WRITTEN.items()]
    named += [(path, is_runs_piece) for path in pieces(folder / TRACE)]
    return [str(path.relative_to(folder)) for path, is_ours in named if _exists(path) and not _is(is_ours, path)]


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


def _digest_of(summary: Mapping[str, Any]) -> str:
    return _digest(json.dumps(summary, sort_keys=True))


def _lines(text: bytes) -> list[bytes]:
    """With their ends; as JSON Lines has them, not at every character that Unicode ends a line at."""
    return text.splitlines(keepends=True)
