"""Which files in a dataset's folder a preparation has written: those alone are replaced or removed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from moetrain.data.manifest import FORMAT, MANIFEST, SPLITS

_DATA = r"[A-Za-z0-9][A-Za-z0-9._-]*\.(train|validation)\.(bin|idx)"
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
