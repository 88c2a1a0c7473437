"""The checkpoint that a run starts from: where it is, and whether the run may; asked before torch is loaded."""

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint import CorruptCheckpointError, Manifest, list_checkpoints, step_path
from moetrain.checkpoint.manifest import check_sizes
from moetrain.checkpoint.names import MANIFEST, step_of
from moetrain.config import RunConfig, StartConfig
from moetrain.config.errors import naming, require
from moetrain.config.load import read_toml, run_from_dict
from moetrain.models import names
from moetrain.train.differences import computing_in, config_differences, model_differences, pairs, shortened
from moetrain.train.own_files import is_runs_config

logger = logging.getLogger(__name__)
DATA = "data"  # key in a checkpoint's JSON; older ones lack it
DTYPE = "dtype"  # likewise, the type that it was computed in


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to start from."""

    path: Path  # absolute, of the checkpoint
    manifest: Manifest

    def config(self) -> RunConfig | None:
        """What its run ran with; None where it does not say.

        Raises:
            ValueError: it is not a configuration of this version.
        """
        if "config" not in self.manifest.extra:
            return None
        try:
            return run_from_dict(self.manifest.extra["config"])
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"--from: the configuration in {self.path} is not one of this version: {error}; go on with the version "
                "that wrote it"
            ) from error

    def has_moments(self) -> bool:
        """Whether its optimizer had any."""
        return any(map(names.is_moment, self.manifest.tensors))


def find_source(run: RunConfig) -> Source | None:
    """The checkpoint that ``start.checkpoint`` names, checked against the rest of ``run``; None where it names none.

    The contents of its files are not read: that is for all ranks together.

    Raises:
        ValueError: there is none, or it is damaged, or is of another model; in words that name ``--from``.
    """
    if run.start.checkpoint is None:
        return None
    source = locate(run.start.checkpoint, run.run_dir)
    _require_other_folder(source.path, run)
    saved = source.config()
    differences = [] if saved is None else model_differences(saved, run)
    require(
        not differences,
        f"--from: {source.path} is of another model ({shortened(differences)}); give the same model, or train anew",
    )
    require(
        not run.start.position or source.manifest.step < run.train.steps,
        f"train.steps ({run.train.steps}) must be more than the {source.manifest.step} steps that --from "
        f"{run.start.checkpoint} has done; raise train.steps, or count anew with --start.position false",
    )
    return source


def locate(asked: Path, run_dir: Path | None = None) -> Source:
    """The checkpoint that ``RUN@STEP``, ``RUN`` or a checkpoint's own folder means; never what is in ``run_dir``.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    with naming("--from", "name a run's folder, as RUN or RUN@STEP, that can be read"):
        return _located(*_readings(asked, run_dir)[0])


def _located(folder: Path, step: int | None) -> Source:
    require(
        folder.is_dir(),
        f"--from must name a run's folder or a checkpoint's, as RUN or RUN@STEP, but {folder} is none; correct it",
    )
    if (folder / MANIFEST).is_file() and step is None:
        return _read(folder)
    found = _checkpoints_of(folder)
    require(bool(found), f"--from: {folder} holds no checkpoint; name the folder of a run that has saved one")
    if step is None:
        return _newest(found, folder)
    steps = ", ".join(str(step_of(path)) for path in found)
    named = [path for path in found if path == step_path(path.parent, step)]
    require(bool(named), f"--from: {folder} has no checkpoint of step {step}; it has those of steps {steps}")
    return _read(named[0])


def _checkpoints_of(folder: Path) -> list[Path]:
    """Checkpoints of a run, or in a folder of checkpoints, oldest first."""
    return next((found for path in (folder / "checkpoints", folder) if (found := list_checkpoints(path))), [])


def source_differences(source: Source, run: RunConfig, data: Mapping[str, Any], dtype: str) -> list[str]:
    """What ``run`` learns otherwise than the source's run, in words.

    Args:
        source: the checkpoint.
        run: starts from it.
        data: what its dataset holds.
        dtype: of its compute, as ``"bfloat16"``.
    """
    saved = source.config()
    changed = bool(pairs(source.manifest.extra.get(DATA, data), data))
    found = [f"the data were others, not those of {run.data.path}"] if changed else []
    if saved is None:
        return found
    saved = replace(saved, data=replace(saved.data, path=run.data.path))
    return [*differences_from(saved, source.manifest.extra, run, dtype), *found]


def differences_from(saved: RunConfig, extra: Mapping[str, Any], run: RunConfig, dtype: str) -> list[str]:
    """Fields by which ``run`` learns otherwise, from here on, than what wrote a checkpoint.

    Types of compute are compared, not the words for them; where an older checkpoint does not say in which it was
    computed, nothing but the words is known.

    Args:
        saved: the configuration in the checkpoint.
        extra: the checkpoint's JSON.
        run: the configuration to go on with.
        dtype: what ``run.train.dtype`` means on this machine.
    """
    is_known = DTYPE in extra or saved.train.dtype != "auto"
    now = computing_in(run, dtype) if is_known else run
    found = config_differences(computing_in(saved, extra.get(DTYPE)), now, have_weights=True)
    if run.train.dtype != "auto":
        return found
    return [f"{each} (auto here)" if each.startswith("train.dtype ") else each for each in found]


def means_same(asked: StartConfig, noted: StartConfig, run_dir: Path) -> bool:
    """Whether ``asked`` is what the run in ``run_dir`` has noted: it names none, or that checkpoint, or its run.

    Where the other run's folder was moved or copied, the checkpoint is known by its checksum.
    """
    if asked.checkpoint is None:
        return True
    if noted.checkpoint is None or (asked.optimizer, asked.position) != (noted.optimizer, noted.position):
        return False
    wanted, known = (
        [_run_and_step(*reading) for reading in _readings(path, run_dir)]
        for path in (asked.checkpoint, noted.checkpoint)
    )
    is_same = any(run == noted_run and step in (None, at) for run, step in wanted for noted_run, at in known)
    return is_same or same_elsewhere(asked, noted, run_dir) is not None


def same_elsewhere(asked: StartConfig, noted: StartConfig, run_dir: Path) -> Path | None:
    """Where what ``asked`` names has the very checkpoint that the run in ``run_dir`` has noted; None: it has not."""
    if asked.checkpoint is None or not noted.sha256:
        return None
    folder, step = _readings(asked.checkpoint, run_dir)[0]
    is_checkpoint = step is None and (folder / MANIFEST).is_file()
    for path in [folder] if is_checkpoint else _checkpoints_of(folder):
        with contextlib.suppress(CorruptCheckpointError, OSError):
            if step in (None, step_of(path)) and Manifest.read(path).sha256() == noted.sha256:
                return path
    return None


def start_difference(noted: StartConfig, asked: StartConfig) -> str:
    """How they differ, in words."""
    was, now = (
        f"{'nothing' if start.checkpoint is None else start.checkpoint}"
        f"{'' if start.optimizer else ' without moments'}{'' if start.position else ' counting anew'}"
        for start in (noted, asked)
    )
    return f"it started from {was}, --from is {now}"


def base_of_start(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What options are laid over that name neither a preset nor a file: with ``--from``, that run's configuration.

    A run that was started so has it in its own folder, and needs the other one no more.
    """
    asked = options.get("start", {}).get("checkpoint")
    if asked is None:
        return {}
    run_dir = Path(options.get("run_dir", ""))
    own = run_dir / "config.toml"
    if own.is_file() and is_runs_config(own):
        with contextlib.suppress(ValueError, TypeError):
            values = read_toml(own)
            if means_same(StartConfig(**options["start"]), run_from_dict(values).start, run_dir):
                return values
    source = locate(asked, run_dir)
    values = dict(source.manifest.extra.get("config", {}))
    values.pop("start", None)
    if "train" in values:
        values["train"] = {**values["train"], "overwrite": False}
    return values


def _readings(asked: Path, run_dir: Path | None) -> list[tuple[Path, int | None]]:
    """What a path can mean, the first before the others: a folder, and the step behind ``@`` if there is one.

    A folder whose own name has an ``@`` means itself first, but for ``run_dir``: no run starts from its own folder.
    """
    itself = Path(os.path.abspath(asked)), None
    name, at, step = asked.name.rpartition("@")
    if not (at and name and step.isascii() and step.isdigit()):
        return [itself]
    of_run = Path(os.path.abspath(asked.with_name(name))), int(step)
    is_own = run_dir is not None and os.path.realpath(asked) == os.path.realpath(run_dir)
    return [itself, of_run] if asked.is_dir() and not is_own else [of_run]


def _run_and_step(folder: Path, step: int | None = None) -> tuple[Path, int | None]:
    """The run's folder and the step, of a checkpoint's folder in it too."""
    if step is None and (step := step_of(folder)) is not None:
        folder = folder.parent
    return (folder.parent if folder.name == "checkpoints" else folder), step


def _newest(checkpoints: list[Path], folder: Path) -> Source:
    for path in reversed(checkpoints):
        try:
            return _read(path)
        except ValueError as error:
            logger.warning("%s; trying the one before it", error)
    raise ValueError(f"--from: none of the checkpoints in {folder} is whole (see the warnings); restore one")


def _read(path: Path) -> Source:
    try:
        manifest = Manifest.read(path)
        check_sizes(path, manifest)
    except (CorruptCheckpointError, OSError) as error:
        reason = error.reason if isinstance(error, CorruptCheckpointError) else error.strerror
        raise ValueError(f"--from: checkpoint {path} is damaged: {reason}; name another one as RUN@STEP") from error
    return Source(path, manifest)


def _require_other_folder(path: Path, run: RunConfig) -> None:
    own = Path(os.path.realpath(run.run_dir))
    require(
        own not in Path(os.path.realpath(path)).parents,
        f"run_dir {run.run_dir} must be another folder than that of the run it starts from, {path}; choose another "
        "--run-dir",
    )
