"""Checkpoints whose checksums hold: one of them, or the newest in a run's folder."""

import logging
from pathlib import Path

import torch.distributed as dist

from moetrain.checkpoint.errors import CorruptCheckpointError
from moetrain.checkpoint.manifest import Manifest, check_file
from moetrain.checkpoint.names import list_checkpoints

logger = logging.getLogger(__name__)


def verify(path: Path, group: dist.ProcessGroup | None = None) -> Manifest:
    """Check every file's checksum, the files shared out over the ranks of ``group``. Collective.

    Raises:
        CorruptCheckpointError: on every rank alike, naming the first file that is wrong.
    """
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    manifest: Manifest | None = None
    reason = ""
    try:
        manifest = Manifest.read(path)
        for file_idx, (name, stated) in enumerate(sorted(manifest.files.items())):
            if file_idx % size == rank:
                check_file(path, name, stated)
    except CorruptCheckpointError as error:
        reason = error.reason
    except OSError as error:
        reason = str(error)
    if first := next(filter(None, _gather(reason, group)), None):
        raise CorruptCheckpointError(path, first)
    assert manifest is not None
    return manifest


def find_latest(folder: Path, group: dist.ProcessGroup | None = None) -> Path | None:
    """Where the newest checkpoint is whose checksums hold, or None; see ``find_verified``. Collective."""
    found = find_verified(folder, group)
    return None if found is None else found[0]


def find_verified(folder: Path, group: dist.ProcessGroup | None = None) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose checksums hold, and what it says of itself, or None. Collective.

    Damaged ones are passed over with a warning each, and stay.
    """
    num_damaged = 0
    found: tuple[Path, Manifest] | None = None
    for path in reversed(_agree(list_checkpoints(folder), group)):
        try:
            found = path, verify(path, group)
            break
        except CorruptCheckpointError as error:
            num_damaged += 1
            logger.warning("%s; trying the one before it", error)
    if num_damaged:
        logger.warning(
            "%d damaged checkpoint(s) stay in %s until the run saves their steps anew; remove them or restore them",
            num_damaged,
            folder,
        )
    return found


def _gather(text: str, group: dist.ProcessGroup | None) -> list[str]:
    if group is None:
        return [text]
    texts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return texts


def _agree(paths: list[Path], group: dist.ProcessGroup | None) -> list[Path]:
    """The first rank's list, so that all ranks try the same ones in the same order."""
    if group is None:
        return paths
    names: list[list[Path]] = [paths]
    dist.broadcast_object_list(names, src=dist.get_global_rank(group, 0), group=group)
    return names[0]
