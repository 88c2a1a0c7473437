"""The folder of a run: its configuration, checkpoints, metrics and summary, and who may use it."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint import list_checkpoints
from moetrain.config import RunConfig
from moetrain.config.load import read_toml, run_from_dict, to_dict, to_toml

# What may change when a run goes on: where and how it runs and what it shows, not what it learns.
FREE_FIELDS = frozenset(
    {
        "run_dir",
        "train.device",
        "train.log_every",
        "train.overwrite",
        "train.threads",
        "train.timeout_s",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.resume",
    }
)


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is created."""
        self.path = path
        self.config = path / "config.toml"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"

    def check(self, run: RunConfig) -> None:
        """Raise unless ``run`` may use this folder: it is new, or holds the same run, or is to be overwritten.

        Raises:
            ValueError: naming what differs and what to do.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir must be a folder, got the file {self.path}; choose another --run-dir")
        if run.train.overwrite or not self.config.is_file():
            return
        cure = "choose another --run-dir, or add --train.overwrite to replace that run"
        differences = config_differences(run_from_dict(read_toml(self.config)), run)
        if differences:
            raise ValueError(
                f"run_dir {self.path} holds a run with another configuration ({'; '.join(differences[:4])}); {cure}"
            )
        if not run.checkpoint.resume and list_checkpoints(self.checkpoints):
            raise ValueError(f"run_dir {self.path} holds this run already, and checkpoint.resume is false; {cure}")

    def open(self, run: RunConfig) -> None:
        """Create the folder and write the configuration. One rank calls it, after ``check``."""
        self.path.mkdir(parents=True, exist_ok=True)
        if run.train.overwrite:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            for path in (self.config, self.metrics, self.summary):
                path.unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        # Whoever starts from this file later wants the same run, not to wipe it out.
        write_whole(self.config, to_toml(replace(run, train=replace(run.train, overwrite=False))))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_whole(self.summary, json.dumps(summary, indent=1) + "\n")


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Fields that make ``new`` another run than ``old``, as ``"optim.lr was 0.003, is 0.001"``.

    The mesh may differ: checkpoints load under any.
    """
    olds, news = _flat(to_dict(old)), _flat(to_dict(new))
    names = sorted(name for name in olds.keys() | news.keys() if name not in FREE_FIELDS and name[:5] != "mesh.")
    return [
        f"{name} was {olds.get(name)!r}, is {news.get(name)!r}" for name in names if olds.get(name) != news.get(name)
    ]


def write_whole(path: Path, text: str) -> None:
    """Replace a file's content in one step, so that no reader sees half of it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
