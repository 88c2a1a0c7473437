"""Which files in a dataset's folder a preparation has written: those alone are replaced or removed."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from moetrain.data.indexed import MAGIC
from moetrain.data.manifest import FORMAT, MANIFEST, SPLITS

_DATA = r"[A-Za-z0-9][A-Za-z0-9._-]*\.(train|validation)\.(bin|idx)"
_BEING_WRITTEN = re.compile(rf"\.(?P<file>{_DATA})\.(?P<process>[1-9]\d*)\.partial")
_FILE = re.compile(_DATA)
_IN_DRAFT = re.compile(rf"{re.escape(MANIFEST)}|{_DATA}|\.{_DATA}\.\d+\.partial")  # the last are an IndexedWriter's


def strangers(dataset: Path) -> list[str]:
    """Names in the folder ``dataset`` of what is no part of one: what its manifest does not name, folders.

    Where the manifest is damaged, what is called like a dataset's file passes for one.
    """
    known = _names_of_dataset(dataset / MANIFEST)
    return _others(dataset, lambda name: name in known or (known == {MANIFEST} and _is(_FILE, name)))


def strangers_in_draft(folder: Path) -> list[str]:
    """Names in the folder of a dataset in the making of what a preparation does not write there."""
    manifest = folder / MANIFEST
    if manifest.is_file() and not _names_of_dataset(manifest):
        return [MANIFEST]
    return _others(folder, lambda name: _is(_IN_DRAFT, name))


def is_unlocked_draft(folder: Path) -> bool:
    """Whether all in ``folder`` is what a killed preparation of an earlier version left, which locked nothing.

    That version's names may be a user's too, so files are told by more than that: by the process in the name of what
    was being written, which must be no more, and by the index beside what was whole. An empty folder tells nothing.
    """
    names = {path.name for path in folder.iterdir()}
    being_written = {name: found for name in names if (found := _BEING_WRITTEN.fullmatch(name))}
    whole = names - being_written.keys()
    followed = {found["file"] for found in being_written.values()}
    return (
        bool(names)
        and not any(_is_alive(int(found["process"])) for found in being_written.values())
        and all(_is(_FILE, name) for name in whole)
        and all((folder / name).is_file() and not (folder / name).is_symlink() for name in names)
        and all(_has_index(folder, name) or f"{name.removesuffix('.bin')}.idx" in followed for name in whole)
    )


def _has_index(folder: Path, name: str) -> bool:
    """Whether the index of this file, or this index, begins as each does, and both are there."""
    pair = [folder / f"{name.rpartition('.')[0]}.{kind}" for kind in ("bin", "idx")]
    if not all(path.is_file() for path in pair):
        return False
    with pair[1].open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def remove(folder: Path) -> bool:
    """Remove the files of a dataset, finished or not; returns whether nothing else was there, and the folder is gone.

    Call it for a folder of a preparation: files are told by their names alone.
    """
    kept = _others(folder, lambda name: _is(_IN_DRAFT, name))
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):  # which tells whose the others are
        if path.name not in kept:
            path.unlink(missing_ok=True)
    if kept:
        return False
    folder.rmdir()
    return True


def _others(folder: Path, is_ours: Callable[[str], bool]) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not (is_ours(path.name) and path.is_file()))


def _is(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(name) is not None


def _names_of_dataset(manifest: Path) -> set[str]:
    """What the manifest names, and itself; that alone where it is damaged; nothing where it is none of ours."""
    if not manifest.is_file():
        return set()
    try:
        raw = json.loads(manifest.read_bytes())
    except ValueError:
        return {MANIFEST}
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return set()
    try:
        return {MANIFEST, *(name for domain in raw["domains"].values() for s in SPLITS for name in domain[s]["files"])}
    except (KeyError, TypeError, AttributeError):
        return {MANIFEST}
