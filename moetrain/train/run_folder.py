"""The folder of a run: its configuration, checkpoints, metrics and summary, and who may use it."""

import contextlib
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

from moetrain.checkpoint import CorruptCheckpointError
from moetrain.checkpoint import Manifest as CheckpointManifest
from moetrain.checkpoint.names import foreign_manifest, list_checkpoints, remove_all, step_of
from moetrain.config import RunConfig
from moetrain.config.errors import require
from moetrain.config.files import write_whole
from moetrain.config.load import read_toml, run_from_dict, to_toml
from moetrain.data.manifest import Manifest, data_facts
from moetrain.placement.trace import pieces
from moetrain.train.differences import computing_in, config_differences, pairs, shortened
from moetrain.train.own_files import (
    PROFILE,
    SUMMARY_DIGEST,
    TRACE,
    WRITTEN,
    stamped,
    strange_lines,
    strangers,
    with_digest,
)
from moetrain.train.sequence_profile import SequenceProfile
from moetrain.train.source import DATA, DTYPE, Source, find_source, means_same, same_elsewhere, start_difference

logger = logging.getLogger(__name__)

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
        self.profile = path / PROFILE
        self.trace = path / TRACE

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
        self._check_places(run)
        require(
            self.trace.is_dir() or not (run.placement.trace and os.path.lexists(self.trace)),
            f"run_dir {self.path} must have a folder for placement.trace, but {self.trace} is a file; rename it, or "
            "choose another --run-dir",
        )
        if run.train.overwrite or not self._is_used():
            return
        saved = run_from_dict(read_toml(self.config))
        if not means_same(run.start, saved.start, self.path):
            raise ValueError(self.other_run([start_difference(saved.start, run.start)]))
        if os.path.abspath(saved.data.path) != os.path.abspath(run.data.path):
            saved = self._with_data_of(saved, run)
        have_weights = bool(list_checkpoints(self.checkpoints)) or saved.start.checkpoint is not None
        if differences := config_differences(self._with_dtype_of(saved, run), run, have_weights=have_weights):
            raise ValueError(self.other_run(differences))
        if not run.checkpoint.resume and list_checkpoints(self.checkpoints):
            raise ValueError(
                f"run_dir {self.path} holds this run already, and checkpoint.resume is false; {self.cure()}"
            )

    def _check_strangers(self) -> None:
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise ValueError(
                f"run_dir {self.path} must have a folder for checkpoints, but {self.checkpoints} is a file; rename it, "
                "or choose another --run-dir"
            )
        if found := strangers(self.path):
            at = strange_lines(self.metrics)[:1] if self.metrics.name in found and self.metrics.is_file() else []
            line = "".join(f" (line {number} of {self.metrics.name} is no record)" for number in at)
            raise ValueError(
                f"run_dir {self.path} holds {' and '.join(found)} that no run has written or that was changed since, "
                f"and training would replace it{line}; rename it, or choose another --run-dir"
            )

    def _check_places(self, run: RunConfig) -> None:
        """Raise where another program's checkpoint has a name that one of ``run`` is to get."""
        every, last = run.checkpoint.every, run.train.steps
        named = self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else ()
        for path in sorted(named):
            step = step_of(path)
            is_due = step is not None and (step == last or (0 < step < last and every > 0 and step % every == 0))
            if is_due and (found := foreign_manifest(path)):
                raise ValueError(
                    f"run_dir {self.path} holds {found} that no run has written, where training would save its step "
                    f"{step}; rename that folder, or choose another --run-dir"
                )

    def begin(self, run: RunConfig) -> tuple[RunConfig, Source | None]:
        """``run`` as it is to go on in this folder, and the checkpoint to start from if nothing is saved here yet.

        Raises:
            ValueError: ``run`` may not use this folder, or not start from what it names; see ``find_source``.
        """
        self.check(run)
        if not run.train.overwrite and self._is_used():
            noted = run_from_dict(read_toml(self.config)).start  # not what is newest there now
            if noted.checkpoint and not noted.checkpoint.is_dir():
                moved = same_elsewhere(run.start, noted, self.path)
                noted = replace(noted, checkpoint=moved or noted.checkpoint)
            run = replace(run, start=noted)
        if list_checkpoints(self.checkpoints) and not run.train.overwrite:
            return run, None
        return run, find_source(run)

    def cure(self) -> str:
        """What somebody can do whose run is not the one in this folder."""
        start = f" and start from this run's newest checkpoint with --from {self.path}"
        return (
            f"choose another --run-dir{start if list_checkpoints(self.checkpoints) else ''}, or replace that run with "
            "--train.overwrite (launch/quickstart.sh: --fresh)"
        )

    def other_run(self, differences: Sequence[str]) -> str:
        """The sentence that refuses a run that differs from the one in this folder."""
        return f"run_dir {self.path} holds a run with another configuration ({shortened(differences)}); {self.cure()}"

    def other_data(self, run: RunConfig, was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """The sentence that refuses other data than this folder's run has had, or nothing; see ``data_facts``."""
        changed = [f"its {name} was {before!r}, is {after!r}" for name, before, after in pairs(was, now)]
        if not changed:
            return ""
        return (
            f"run_dir {self.path} holds a run on other data than {run.data.path} has now ({shortened(changed)}); "
            f"restore the dataset, or {self.cure()}"
        )

    def _with_data_of(self, saved: RunConfig, run: RunConfig) -> RunConfig:
        """``saved`` with the data path of ``run``, if that holds what this folder's run was trained on.

        Its newest checkpoint says what that was; without any, what is at the path that it had.

        Raises:
            ValueError: the data are known, and others.
        """
        was = self._said_by_checkpoints(DATA)
        if was is None and not list_checkpoints(self.checkpoints):
            with contextlib.suppress(ValueError, OSError):
                was = data_facts(Manifest.read(saved.data.path))
        if was is None:
            return saved
        if reason := self.other_data(run, was, data_facts(Manifest.read(run.data.path))):
            raise ValueError(reason)
        return replace(saved, data=replace(saved.data, path=run.data.path))

    def _with_dtype_of(self, saved: RunConfig, run: RunConfig) -> RunConfig:
        """``saved`` with the type that its ``train.dtype`` has come to, where its checkpoints say and it matters.

        What ``auto`` means for ``run`` only its ranks know: they compare it with the checkpoint that they go on from.
        """
        if saved.train.dtype == run.train.dtype:
            return saved
        noted = self._said_by_checkpoints(DTYPE)
        return computing_in(saved, "auto" if noted is not None and run.train.dtype == "auto" else noted)

    def _said_by_checkpoints(self, key: str) -> Any:
        """What the newest checkpoint that can be read has under ``key`` in its JSON; None where it says nothing."""
        for path in reversed(list_checkpoints(self.checkpoints)):
            with contextlib.suppress(CorruptCheckpointError, OSError):
                return CheckpointManifest.read(path).extra.get(key)
        return None

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
        saved = run_from_dict(read_toml(self.config)).train
        is_result = isinstance(summary, dict) and summary.get("steps") == run.train.steps
        if is_result:
            summary.pop(SUMMARY_DIGEST, None)
        return summary if is_result and saved.final_eval_rows == run.train.final_eval_rows else None

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

        Raises:
            ValueError: a file that no run has written came there since.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if run.train.overwrite:
            self._check_strangers()  # again: ranks took a while to meet
            remove_all(self.checkpoints)
            for name in WRITTEN:
                (self.path / name).unlink(missing_ok=True)
            for piece in pieces(self.trace):
                piece.unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)

    def set_aside(self) -> Path | None:
        """Move the run in this folder to a new one beside it, and return that; None where there is no run.

        What no run has written stays, but for what lies in a checkpoint's folder: that goes with it.

        Raises:
            ValueError: another process uses the folder, or what looks like its run was changed by hand.
        """
        if not self.path.is_dir():
            return None
        self._check_strangers()
        with self.locked():
            files = [self.path / name for name in WRITTEN if (self.path / name).exists()]
            checkpoints = list_checkpoints(self.checkpoints)
            traced = pieces(self.trace)
            if not files and not checkpoints and not traced:
                return None
            aside = RunFolder(self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
            aside.checkpoints.mkdir(parents=True)
            for path in files:
                path.rename(aside.path / path.name)
            for path in checkpoints:
                path.rename(aside.checkpoints / path.name)
            for path in traced:
                aside.trace.mkdir(exist_ok=True)
                path.rename(aside.trace / path.name)
        return aside.path

    def write_config(self, run: RunConfig) -> None:
        """Write the configuration, once ``run`` is known to be the one that the folder is to hold."""
        # Whoever starts from this file later wants the same run, not to wipe it out.
        write_whole(self.config, stamped(to_toml(replace(run, train=replace(run.train, overwrite=False)))))

    def write_profile(self, profile: SequenceProfile) -> None:
        """Write ``profile.json``."""
        write_whole(self.profile, profile.text())

    def read_profile(self) -> SequenceProfile | None:
        """What this folder's run was planned by, if it is there."""
        return SequenceProfile.read(self.profile) if self.profile.is_file() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_whole(self.summary, json.dumps(with_digest(summary), indent=1) + "\n")


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
