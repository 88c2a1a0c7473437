"""Starting a run from another one's checkpoint, on all ranks together."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.checkpoint import CorruptCheckpointError, Manifest
from moetrain.checkpoint.folder import verify
from moetrain.checkpoint.save_load import load
from moetrain.config import StartConfig
from moetrain.models import names
from moetrain.train.agreement import dtype_name
from moetrain.train.engine import Engine
from moetrain.train.optimizer import set_num_updates
from moetrain.train.source import Source, source_differences
from moetrain.train.state import state_to_load
from moetrain.train.world import RefusedByAllError

START = "started_from"  # key in a checkpoint's JSON and in the summary


@dataclass(frozen=True, slots=True)
class StartReport:
    """Where a run began, for its checkpoints and its summary.

    Attributes:
        checkpoint: what it started from.
        step: of that checkpoint.
        moments: whether the optimizer's moments were taken.
        position: whether steps and rows are counted on from there.
        differences: what is learnt otherwise than there, in words.
        sha256: what that checkpoint's ``metadata.json`` states; None where an older run did not note it.
    """

    checkpoint: str
    step: int
    moments: bool
    position: bool
    differences: tuple[str, ...]
    sha256: str | None = None

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "StartReport":
        """What ``to_json`` gave."""
        return StartReport(**{**values, "differences": tuple(values["differences"])})

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "differences": list(self.differences)}

    def lines(self) -> list[str]:
        """In words."""
        taken = "weights and moments" if self.moments else "weights, no moments"
        counted = "steps and rows count on from there" if self.position else "steps and rows count from 0"
        found = [f"started from {self.checkpoint}, after its step {self.step}: {taken}; {counted}"]
        return [*found, *(f"other than there: {difference}" for difference in self.differences)]


def agreed_source(source: Source | None, group: dist.ProcessGroup) -> Source | None:
    """The first rank's source, verified; None on all ranks where it has none. Collective over ``group``.

    Raises:
        RefusedByAllError: a file of it is missing or changed; on every rank alike.
    """
    paths: list[Path | None] = [None if source is None else source.path]
    dist.broadcast_object_list(paths, group=group, group_src=0)
    if (path := paths[0]) is None:
        return None
    try:
        return Source(path, verify(path, group))
    except CorruptCheckpointError as error:
        raise RefusedByAllError(
            f"--from: checkpoint {path} is damaged: {error.reason}; name another one as RUN@STEP"
        ) from error


def start_engine(
    engine: Engine, source: Source, start: StartConfig, data: Mapping[str, Any], group: dist.ProcessGroup | None
) -> StartReport:
    """Take from a verified checkpoint what ``start`` says, whatever ranks wrote it. Collective over ``group``.

    The balancing state comes with the weights, as routing depends on it. What the checkpoint lacks of that or of
    moments stays as new: another optimizer, or another way of balancing, may have written it.

    Args:
        engine: before its first step.
        source: what ``agreed_source`` gave.
        start: what to take.
        data: what the dataset holds; see ``data_facts``.
        group: all ranks.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    moments = start.optimizer and engine.run.optim.name == "adamw" and source.has_moments()
    balance = engine.balance.state_dict()
    state = state_to_load(engine, balance, source.manifest)
    wanted = {name: tensor for name, tensor in state.items() if _is_wanted(name, source.manifest, moments)}
    load(source.path, wanted, group=group, manifest=source.manifest)
    engine.balance.load_state_dict(balance)
    engine.store.advance_epoch()
    if moments:
        set_num_updates(engine.optimizer, source.manifest.extra.get("num_updates", 0))
    if start.position:
        engine.num_steps_done = source.manifest.step
    differences = tuple(source_differences(source, engine.run, data, dtype_name(engine.compute_dtype)))
    manifest = source.manifest
    return StartReport(str(source.path), manifest.step, moments, start.position, differences, manifest.sha256())


def _is_wanted(name: str, manifest: Manifest, moments: bool) -> bool:
    if names.is_moment(name):
        return moments
    return not names.is_balance(name) or name in manifest.tensors
