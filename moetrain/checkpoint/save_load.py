"""Save and load a state of logical tensors under any number of ranks."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from moetrain.checkpoint.errors import UnsavedCheckpointError
from moetrain.checkpoint.folder import verify
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.names import prune, step_path
from moetrain.checkpoint.planner import ShardLoadPlanner, ShardSavePlanner
from moetrain.checkpoint.shards import State
from moetrain.checkpoint.storage import SafetensorsReader, SafetensorsWriter


def save(
    folder: Path,
    step: int,
    state: State,
    extra: dict[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    keep: int = 0,
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and return its path. Collective over ``group``.

    Args:
        folder: where the run's checkpoints live, seen by all ranks.
        step: optimizer steps taken.
        state: this rank's shards; over all ranks they tile every tensor once.
        extra: JSON stored beside the tensors; the first rank's is taken.
        group: the ranks that save together; None: this process alone.
        keep: how many of the newest checkpoints up to ``step`` stay; 0 keeps all.

    Raises:
        UnsavedCheckpointError: some rank could not write its part; on every rank alike.
        ValueError: the shards do not tile a tensor once.
    """
    rank = 0 if group is None else dist.get_rank(group)
    path = step_path(folder, step)
    with _plain_errors(lambda said: UnsavedCheckpointError(path, said)):
        dcp_save(
            dict(state),
            storage_writer=SafetensorsWriter(path, step=step, rank=rank, extra=extra),
            planner=ShardSavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    if rank == 0:
        prune(folder, keep, step=step)
    return path


def load(
    path: Path, state: State, *, group: dist.ProcessGroup | None = None, manifest: Manifest | None = None
) -> Manifest:
    """Fill the shards of ``state`` in place from the checkpoint at ``path``, whose checksums are verified first.

    Args:
        path: of the checkpoint.
        state: this rank's shards.
        group: the ranks that load together; None: this process alone.
        manifest: what ``verify`` or ``find_verified`` just gave for ``path``; nothing is verified again.

    Raises:
        CorruptCheckpointError: a file is missing or changed.
        ValueError: a tensor is missing or has another shape.
    """
    manifest = verify(path, group) if manifest is None else manifest
    with _plain_errors(lambda said: RuntimeError(f"checkpoint: could not load it: {said}")):
        dcp_load(
            dict(state),
            storage_reader=SafetensorsReader(path, manifest),
            planner=ShardLoadPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    return manifest


@contextmanager
def _plain_errors(make: Callable[[str], Exception]) -> Iterator[None]:
    """Turn DCP's collected failures (a ``BaseException``) into one error that says them, on all ranks alike.

    It is what ``make`` gives for the failures in words, or a ``ValueError`` where all of them are.

    DCP's remark that it works without a process group is silenced: that is what was asked for.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        said = "; ".join(dict.fromkeys(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()))
        if all(isinstance(cause, ValueError) for cause in causes):
            raise ValueError(said) from error
        raise make(said) from error
