"""A dataset in the making: a hidden folder beside its place, locked by who writes it, and moved there by one rename.

So an interrupted preparation never looks like a finished one, and the next one can tell what a killed one has left
from what another is still writing.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = r"[a-z0-9_]{8}"  # of tempfile.mkdtemp


@contextlib.contextmanager
def partial_folder(place: Path) -> Iterator[Path]:
    """A new folder beside ``place``, an absolute path, for what is to be moved there; what is left of it is removed."""
    path, lock = _make_locked(place)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def move_into_place(partial: Path, place: Path, *, replace: bool) -> None:
    """Rename ``partial`` to ``place``; to ``replace`` a folder that is there, it is moved aside first and removed last.

    Raises:
        ValueError: something else came there meanwhile.
    """
    sync(partial)
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
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
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def clear_left_over(place: Path) -> list[Path]:
    """Remove what killed preparations of ``place`` have left beside it, and return that.

    A dataset that one had moved aside, and not replaced yet, goes back to its place. What another process is writing
    stays, and so does everything where folders cannot be locked.
    """
    if not place.parent.is_dir():
        return []
    cleared = []
    for kind in ("old", "partial"):
        name = re.compile(re.escape(f".{place.name}.{kind}-") + _SUFFIX)
        for path in [path for path in place.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]:
            if (lock := _lock_alone(path)) is None:
                continue
            try:
                if kind == "old" and not place.exists():
                    path.rename(place)
                else:
                    shutil.rmtree(path, ignore_errors=True)
                    cleared.append(path)
            finally:
                os.close(lock)
    return cleared


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
        path = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        handle = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # where nothing can be locked, nobody else gets a lock, and clears it
            fcntl.flock(handle, fcntl.LOCK_EX)
        if path.is_dir():  # else another preparation thought, before it was locked, that it was left over
            path.chmod(0o755)
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
