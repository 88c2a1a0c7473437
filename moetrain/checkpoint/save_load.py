"""Save and load a state of logical tensors under any number of ranks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from moetrain.checkpoint.folder import prune, step_path, verify
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.pieces import State
from moetrain.checkpoint.planner import PieceLoadPlanner, PieceSavePlanner
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
        state: this rank's pieces; over all ranks they tile every tensor once.
        extra: JSON stored beside the tensors; the first rank's is taken.
        group: the ranks that save together; None: this process alone.
        keep: how many of the newest checkpoints stay; 0 keeps all.
    """
    rank = 0 if group is None else dist.get_rank(group)
    path = step_path(folder, step)
    with _one_process_is_fine():
        dcp_save(
            dict(state),
            storage_writer=SafetensorsWriter(path, step=step, rank=rank, extra=extra),
            planner=PieceSavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    if rank == 0:
        prune(folder, keep)
    return path


def load(path: Path, state: State, *, group: dist.ProcessGroup | None = None) -> Manifest:
    """Fill the pieces of ``state`` in place from the checkpoint at ``path``, whose checksums are verified first.

    Raises:
        CorruptCheckpointError: a file is missing or changed.
        ValueError: a tensor is missing or has another shape.
    """
    manifest = verify(path, group)
    try:
        with _one_process_is_fine():
            dcp_load(
                dict(state),
                storage_reader=SafetensorsReader(path),
                planner=PieceLoadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        reasons = "; ".join(dict.fromkeys(str(failure) for failure, _ in error.failures.values()))
        raise ValueError(reasons) from error
    return manifest


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Silence DCP's remark that it works without a process group: that is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
