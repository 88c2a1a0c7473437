"""A dataset in the making: a hidden folder beside its place, locked by who writes it, and moved there by one rename.

So an interrupted preparation never looks like a finished one, and the next one can tell what a killed one has left
from what another is still writing.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from moetrain.data.own_files import is_unlocked_draft, remove, strangers, strangers_in_draft

_SUFFIX = r"[0-9a-f]{32}"  # of a folder's name: longer than what somebody else would call a copy, or a date

_EARLIER_SUFFIX = r"[a-z0-9_]{8}"  # of folders that the version before locks made, by tempfile.mkdtemp


@contextlib.contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A new folder beside ``place``, an absolute path, for what is to be moved there; what is left of it is removed."""
    path, lock = _make_locked(place)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            remove(path)
        os.close(lock)


def move_into_place(partial: Path, place: Path, *, replace: bool) -> None:
    """Rename ``partial`` to ``place``; to ``replace`` a folder that is there, it is moved aside first and removed last.

    Raises:
        ValueError: something else came there meanwhile.
    """
    sync(partial)
    old = partial.with_name(f".{place.name}.old-{partial.name.rpartition('-')[2]}")
    lock = _lock_alone(place)  # the one moved aside: nobody else is to put it back
    try:
        if replace and place.exists():
            place.rename(old)
        try:
            partial.rename(place)
        except OSError as error:
            if old.exists():
                old.rename(place)
            raise ValueError(
                f"{place} appeared while it was being prepared ({error.strerror}); run the command again"
            ) from error
        sync(place.parent)
        with contextlib.suppress(OSError):
            remove(old)
    finally:
        if lock is not None:
            os.close(lock)


def clear_left_over(place: Path) -> list[Path]:
    """Remove what killed preparations of ``place`` have left beside it, and return that.

    A dataset that one had moved aside, and not replaced yet, goes back to its place. What another process is writing
    stays, and so does everything where folders cannot be locked. A folder that holds anything but what a preparation
    writes is somebody else's, or was made so: it stays as it is.
    """
    if not place.parent.is_dir():
        return []
    cleared = []
    for kind, others in (("old", strangers), ("partial", strangers_in_draft)):
        beside = _called(place, kind, _SUFFIX)
        if kind == "partial":
            beside += [path for path in _called(place, kind, _EARLIER_SUFFIX) if is_unlocked_draft(path)]
        for path in beside:
            if path.is_symlink() or (lock := _lock_alone(path)) is None:
                continue
            try:
                if others(path):
                    continue
                if kind == "old" and not place.exists():
                    path.rename(place)
                else:
                    remove(path)
                    cleared.append(path)
            finally:
                os.close(lock)
    return cleared


def _called(place: Path, kind: str, suffix: str) -> list[Path]:
    """Folders beside ``place`` of such a name."""
    name = re.compile(re.escape(f".{place.name}.{kind}-") + suffix)
    return [path for path in place.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _make_locked(place: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it, until that is closed or its process ends."""
    while True:
        path = place.with_name(f".{place.name}.partial-{secrets.token_hex(16)}")
        path.mkdir(mode=0o755)
        handle = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # where nothing can be locked, nobody else gets a lock, and clears it
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.is_dir():  # else another preparation thought, before it was locked, that it was left over
            return path, handle
        os.close(handle)


def _lock_alone(path: Path) -> int | None:
    """The descriptor that locks a folder until it is closed; None where another process has it, or none can lock."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
