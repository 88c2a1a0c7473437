"""What a checkpoint's folder and files are called, and which of what lies there a run has written.

Only that is ever removed or replaced: a folder of checkpoints may hold a user's own notes, links and models, and
checkpoints of another program that have the same names. Those are told by what is in them.
"""

import itertools
import json
import logging
import os
import re
from pathlib import Path

MANIFEST = "metadata.json"
FORMAT = "moetrain-checkpoint"  # stands in every manifest
MANIFEST_KEYS = frozenset({"body", "sha256"})
_BEGINNING = b'{\n "body": {\n  "extra": {'  # of every manifest
_DATA_BEGINNING = re.compile(rb'.{8}\{"(?:[^"\\]|\\.)+@[0-9,]*":\{', re.DOTALL)  # an entry is NAME@OFFSET
_NAME = re.compile(r"step-\d{8,}")
_OWN_FILE = re.compile(r"metadata\.json|data-\d{5,}\.safetensors")
_DRAFT = re.compile(r"\.draft-step-\d{8,}")
_BESIDE = re.compile(r"\.(draft|stale)-step-\d{8,}")  # such a link was a checkpoint once, and is stale
logger = logging.getLogger(__name__)


def data_file(rank: int) -> str:
    """The file that ``rank`` writes of a checkpoint."""
    return f"data-{rank:05d}.safetensors"


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lives."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None where it has another name."""
    return int(path.name.removeprefix("step-")) if _NAME.fullmatch(path.name) else None


def draft_path(path: Path) -> Path:
    """Where the checkpoint ``path`` is written before it gets its name."""
    return path.with_name(f".draft-{path.name}")


def stale_path(path: Path) -> Path:
    """Where a damaged checkpoint ``path`` waits until another has its name."""
    return path.with_name(f".stale-{path.name}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first, whole or damaged; neither drafts that a crash left nor other folders."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and own_files(path))
    return sorted(found, key=lambda path: (len(path.name), path.name))


def own_files(checkpoint: Path) -> list[Path]:
    """Files in a checkpoint's folder that a run has written; none where its manifest is another program's.

    A checkpoint may be damaged. Where its manifest is missing or beyond reading, what is in its data files tells that a
    run wrote it; in a draft their names do, as no other program calls a folder so.
    """
    named = [path for path in checkpoint.iterdir() if _OWN_FILE.fullmatch(path.name) and path.is_file()]
    manifest = checkpoint / MANIFEST
    is_ours = _is_runs_manifest(manifest) if manifest in named else None
    if is_ours is None:
        is_ours = _DRAFT.fullmatch(checkpoint.name) is not None or any(map(_is_runs_data, named))
    return named if is_ours else []


def foreign_manifest(checkpoint: Path) -> Path | None:
    """What has a manifest's name in a folder that is called like a checkpoint, and no run has written."""
    manifest = checkpoint / MANIFEST
    return manifest if os.path.lexists(manifest) and not (checkpoint.is_dir() and own_files(checkpoint)) else None


def _is_runs_manifest(path: Path) -> bool | None:
    """Whether a run wrote this ``metadata.json``, be it damaged; None where too little is left of it to tell."""
    with path.open("rb") as file:
        if file.read(len(_BEGINNING)) == _BEGINNING:
            return True
    text = path.read_bytes()
    has_format = FORMAT.encode() in text
    try:
        values = json.loads(text)
    except ValueError:
        return has_format or None
    if not values:
        return None
    known = MANIFEST_KEYS & values.keys() if isinstance(values, dict) else frozenset()
    return known == MANIFEST_KEYS or (has_format and bool(known))  # a damaged bit leaves one of these


def _is_runs_data(path: Path) -> bool:
    """Whether a run wrote this data file: it is safetensors, with an entry of ours as the first one."""
    if path.name == MANIFEST:
        return False
    with path.open("rb") as file:
        return _DATA_BEGINNING.match(file.read(1 << 12)) is not None


def remove(checkpoint: Path) -> bool:
    """Remove what a run has written of a checkpoint; returns whether nothing else was there, and the folder is gone.

    Of a link to a checkpoint elsewhere the link alone is removed.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return True
    for path in own_files(checkpoint):
        path.unlink(missing_ok=True)
    if any(checkpoint.iterdir()):
        return False
    checkpoint.rmdir()
    return True


def remove_all(folder: Path) -> None:
    """Remove every checkpoint and what killed saves have left in ``folder``, and nothing else."""
    beside = [path for path in folder.iterdir() if _is_beside(path)] if folder.is_dir() else []
    for path in (*list_checkpoints(folder), *beside):
        remove(path)


def make_draft(draft: Path) -> None:
    """Make the folder ``draft``, without what a killed save has left in it; what else is there stays.

    What is called like a file of a save, and is none, gets a free name.

    Raises:
        FileExistsError: a file, or a link, has that name; no save makes those.
    """
    if draft.is_dir() and not draft.is_symlink():
        remove(draft)
    draft.mkdir(parents=True, exist_ok=not draft.is_symlink())
    for path in [path for path in draft.iterdir() if _OWN_FILE.fullmatch(path.name)]:
        path.rename(_free(path))


def take_over(stale: Path, into: Path) -> None:
    """Move what no run has written from ``stale``, where that exists, to free names in ``into``, and remove the rest.

    Of a link the link alone is removed; a file moves itself.
    """
    if stale.is_symlink():
        stale.unlink()
    elif stale.is_file():
        stale.rename(_free(into / stale.name))
    elif stale.is_dir():
        own = own_files(stale)
        for path in [path for path in stale.iterdir() if path not in own]:
            path.rename(_free(into / path.name))
        remove(stale)


def _is_beside(path: Path) -> bool:
    is_link = path.is_symlink() and not path.name.startswith(".stale-")
    return _BESIDE.fullmatch(path.name) is not None and path.is_dir() and not is_link


def _free(path: Path) -> Path:
    """``path``, or with the first number behind it that makes it the name of nothing else."""
    numbers = itertools.count(1)
    name = path
    while os.path.lexists(name):
        name = path.with_name(f"{path.name}.{next(numbers)}")
    return name


def prune(folder: Path, keep: int, *, step: int) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step``, the one just written; 0 keeps all.

    Later ones are damaged, which is why the run went on from before them: they count for nothing, and stay. One rank
    calls it.
    """
    if keep <= 0:
        return
    newest = step_path(folder, step).name
    up_to = [path for path in list_checkpoints(folder) if (len(path.name), path.name) <= (len(newest), newest)]
    for path in up_to[:-keep]:
        try:
            if not remove(path):
                logger.warning("%s was removed but for what no run has written there", path)
        except OSError as error:
            logger.warning("%s could not be removed: %s", path, error.strerror)
