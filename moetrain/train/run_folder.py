"""The folder of a run: its configuration, checkpoints, metrics and summary, and who may use it."""

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint.names import list_checkpoints, remove_all
from moetrain.config import RunConfig
from moetrain.config.load import read_toml, run_from_dict, to_dict, to_toml
from moetrain.train.own_files import WRITTEN, stamped, strangers

logger = logging.getLogger(__name__)

# What may change when a run goes on: where and how it runs and what it shows, not what it learns (but for the order of
# sums). Fewer or smaller GPUs need another balance of memory and time than those that wrote the checkpoint. The mesh
# may change as well: where something looks at micro-batches that does change what is learnt, and the run says so.
FREE_FIELDS = frozenset(
    {
        "run_dir",
        "train.activation_checkpoint",
        "train.device",
        "train.log_every",
        "train.overwrite",
        "train.reshard_after_forward",
        "train.threads",
        "train.timeout_s",
        "dispatch.pieces",
        "dispatch.pad_to_capacity",
        "moe.recompute_hidden",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.resume",
    }
)
CURE = "choose another --run-dir, or replace that run with --train.overwrite (launch/quickstart.sh: --fresh)"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


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

        Whatever it is to be, nothing there that no run has written may be replaced.

        Raises:
            ValueError: naming what differs and what to do.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir must be a folder, got the file {self.path}; choose another --run-dir")
        nearest = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
            raise ValueError(f"run_dir {self.path} cannot be made or written to in {nearest}; choose another --run-dir")
        self._check_strangers()
        if run.train.overwrite or not self._is_used():
            return
        if differences := config_differences(run_from_dict(read_toml(self.config)), run):
            raise ValueError(self.refusal(differences))
        if not run.checkpoint.resume and list_checkpoints(self.checkpoints):
            raise ValueError(f"run_dir {self.path} holds this run already, and checkpoint.resume is false; {CURE}")

    def _check_strangers(self) -> None:
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(
                f"run_dir {self.path} must have a folder for checkpoints, but {self.checkpoints} is a file; rename it, "
                "or choose another --run-dir"
            )
        if found := strangers(self.path):
            raise ValueError(
                f"run_dir {self.path} holds {' and '.join(found)} that no run has written or that was changed since, "
                "and training would replace it; rename it, or choose another --run-dir"
            )

    def refusal(self, differences: Sequence[str]) -> str:
        """The sentence that refuses a run that differs from the one in this folder."""
        return f"run_dir {self.path} holds a run with another configuration ({shortened(differences)}); {CURE}"

    def _is_used(self) -> bool:
        """Whether a run has come as far as its first step; what failed before that leaves nothing worth keeping."""
        has_steps = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return self.config.is_file() and (has_steps or bool(list_checkpoints(self.checkpoints)))

    def finished(self, run: RunConfig) -> dict[str, Any] | None:
        """The summary of ``run`` if it has ended here already, else None. Call it after ``check``."""
        if run.train.overwrite or not self.config.is_file():
            return None
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return summary if isinstance(summary, dict) and summary.get("steps") == run.train.steps else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the folder, which is created, for this process; the system frees it however the process ends.

        Where the file system has no locks (parallel ones often not), a warning is all.

        Raises:
            ValueError: another process has it, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise ValueError(
                f"run_dir {self.path} must be a folder that can be written to ({error.strerror}); "
                "choose another --run-dir"
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"run_dir {self.path} is in use by another run; wait for it, or choose another --run-dir"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning(
                    "run_dir %s is on a file system that cannot lock (%s): make sure that no other run uses it",
                    self.path,
                    error.strerror,
                )
            yield
        finally:
            os.close(handle)

    def open(self, run: RunConfig) -> None:
        """Create the folder and write the configuration. One rank calls it, after ``check``."""
        self.make(run)
        self.write_config(run)

    def make(self, run: RunConfig) -> None:
        """Create the folder, and remove the run that is to be overwritten. One rank calls it, after ``check``.

        What else the folder holds stays.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if run.train.overwrite:
            remove_all(self.checkpoints)
            for name in WRITTEN:
                (self.path / name).unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)

    def set_aside(self) -> Path | None:
        """Move the run in this folder to a new one beside it, and return that; None where there is no run.

        What no run has written stays.

        Raises:
            ValueError: another process uses the folder, or what looks like its run was changed by hand.
        """
        if not self.path.is_dir():
            return None
        self._check_strangers()
        with self.locked():
            files = [self.path / name for name in WRITTEN if (self.path / name).exists()]
            checkpoints = list_checkpoints(self.checkpoints)
            if not files and not checkpoints:
                return None
            aside = RunFolder(self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
            aside.checkpoints.mkdir(parents=True)
            for path in files:
                path.rename(aside.path / path.name)
            for path in checkpoints:
                path.rename(aside.checkpoints / path.name)
        return aside.path

    def write_config(self, run: RunConfig) -> None:
        """Write the configuration, once ``run`` is known to be the one that the folder is to hold."""
        # Whoever starts from this file later wants the same run, not to wipe it out.
        write_whole(self.config, stamped(to_toml(replace(run, train=replace(run.train, overwrite=False)))))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_whole(self.summary, json.dumps(summary, indent=1) + "\n")


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Fields that make ``new`` another run than ``old``, as ``"optim.lr was 0.003, is 0.001"``.

    The mesh may differ: checkpoints load under any. So may ``FREE_FIELDS``, and the size of micro-batches unless
    something looks at them.
    """
    olds, news = flat_config(old), flat_config(new)
    olds["data.path"], news["data.path"] = os.path.abspath(old.data.path), os.path.abspath(new.data.path)
    free = FREE_FIELDS if looks_at_micro_batches(new) else FREE_FIELDS | {"data.micro_batch"}
    names = sorted(name for name in olds.keys() | news.keys() if name not in free and name[:5] != "mesh.")
    return [
        f"{name} was {olds.get(name)!r}, is {news.get(name)!r}" for name in names if olds.get(name) != news.get(name)
    ]


def flat_config(run: RunConfig) -> dict[str, Any]:
    """Every field by its dotted name, as ``{"optim.lr": 0.003, ...}``; those that are None are left out."""
    return _flat(to_dict(run))


def shortened(differences: Sequence[str], most: int = 4) -> str:
    """The first ``most`` of ``differences`` in one line, and how many more there are."""
    rest = [f"{len(differences) - most} more"] if len(differences) > most else []
    return "; ".join([*differences[:most], *rest])


def looks_at_micro_batches(run: RunConfig) -> list[str]:
    """Fields by which something sees where a rank's micro-batch ends; its size and the mesh then decide what is learnt.

    Without any, both only say how much of a step is computed at once, and where.
    """
    fields = {
        "dispatch.capacity_factor": run.dispatch.capacity_factor is not None,
        "dispatch.rounding": run.dispatch.rounding != "none",
        "balance.scope": run.balance.scope == "micro",
    }
    return [name for name, looks in fields.items() if looks]


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The end of a run in words. The entropies are what the best predictor from 0, 1 or 2 bytes of context reaches."""
    loss = summary["validation_loss"]
    if loss is None:
        return [
            f"train loss {summary['train_loss']:.4f} nats per token after {summary['steps']} steps; the dataset has no "
            "validation text: prepare it from more files, or with a larger --validation"
        ]
    rows, in_all = summary.get("validation_rows"), summary.get("validation_rows_in_all")  # older summaries lack them
    part = "" if rows == in_all else f", on {rows:,} of {in_all:,} rows"
    text = "the whole validation text" if part else "the validation text"
    lines = [
        f"validation loss {loss:.4f} nats per token after {summary['steps']} steps{part} (train "
        f"{summary['train_loss']:.4f})"
    ]
    for name in ("unigram", "bigram", "trigram"):
        entropy = summary[f"{name}_entropy"]
        side = "below" if loss < entropy else "above"
        lines.append(f"  {abs(loss - entropy):.4f} {side} the {name} entropy of {text}, {entropy:.4f}")
    return lines


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
