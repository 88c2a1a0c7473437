"""Whether all ranks have one and the same run folder, asked before anything there is loaded or changed.

A folder that each machine has for itself would show late and mislead: what one rank wrote is missing elsewhere, so
every checkpoint looks damaged there, and a run that was to go on is refused as if its checkpoints were lost.
"""

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from moetrain.train.world import RefusedByAllError

SEEN_WITHIN_S = 10.0  # that a network file system gets to show on one machine what was written on another
_MARK = ".shared-"
_NAME = re.compile(re.escape(_MARK) + "[0-9a-f]{32}")
_TEXT = "moetrain looks whether all ranks see this file; it may be removed.\n"


@dataclass(frozen=True, slots=True)
class Sight:
    """What one rank sees: whether the mark is in its folder, and where that is, as ``"machine:/path"``."""

    seen: bool
    place: str


def require_shared(folder: Path, group: dist.ProcessGroup | None = None, within_s: float = SEEN_WITHIN_S) -> None:
    """Go on only if every rank sees in ``folder`` a file that the first one puts there for the while. Collective.

    Args:
        folder: exists on the first rank, which may write to it.
        group: the ranks; None: the default group.
        within_s: seconds after which a rank that does not see it gives up.

    Raises:
        RefusedByAllError: some rank does not see it; on every rank alike.
    """
    is_first = dist.get_rank(group) == 0
    with mark(folder) if is_first else contextlib.nullcontext("") as name:
        names = [name]
        dist.broadcast_object_list(names, group=group, group_src=0)
        mine = Sight(sees(folder, names[0], within_s), f"{socket.gethostname()}:{folder.absolute()}")
        sights = [mine] * dist.get_world_size(group)
        dist.all_gather_object(sights, mine, group=group)  # so the mark stays until all have looked
    if reason := not_shared(sights):
        raise RefusedByAllError(reason)


@contextlib.contextmanager
def mark(folder: Path) -> Iterator[str]:
    """A new file in ``folder`` whose name nothing can know that does not see it; gives the name."""
    for stale in [path for path in folder.iterdir() if _is_mark(path)]:  # of a run that was killed while it looked
        stale.unlink(missing_ok=True)
    path = folder / f"{_MARK}{secrets.token_hex(16)}"
    path.write_text(_TEXT, encoding="utf-8")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _is_mark(path: Path) -> bool:
    """Whether ``mark`` made this file, be it killed before it had written all of it."""
    if not (_NAME.fullmatch(path.name) and path.is_file() and path.stat().st_size <= len(_TEXT)):
        return False
    return _TEXT.startswith(path.read_text(encoding="utf-8", errors="replace"))


def sees(folder: Path, name: str, within_s: float) -> bool:
    """Whether ``folder`` has the file ``name``, at the latest after ``within_s`` seconds."""
    deadline = time.monotonic() + within_s
    while not os.path.isfile(folder / name):  # false also where the network file system fails for a moment
        if time.monotonic() >= deadline:
            return False
        _ask_the_server(folder)
        time.sleep(0.1)
    return True


def not_shared(sights: Sequence[Sight]) -> str:
    """The sentence that refuses, or nothing where every rank sees the mark. ``sights`` are in rank order."""
    blind = [rank for rank, sight in enumerate(sights) if not sight.seen]
    if not blind:
        return ""
    return (
        f"run_dir must be one folder that all {len(sights)} ranks share, but {len(blind)} of them do not see what rank "
        f"0 wrote to {sights[0].place}, the first of these being rank {blind[0]}, which looked in "
        f"{sights[blind[0]].place}; choose a --run-dir on a file system that every machine mounts at that path"
    )


def _ask_the_server(folder: Path) -> None:
    """Open the folders on the way: an NFS client then forgets what it had noted as missing, for a minute otherwise."""
    for path in (*reversed(folder.absolute().parents), folder):
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))
