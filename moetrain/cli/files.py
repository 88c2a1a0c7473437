"""Files that a command writes its result to."""

import os
from pathlib import Path

from moetrain.config.errors import require


def require_file(option: str, path: Path | None) -> None:
    """See to it that a result can be written, before hours are spent on it. The file's folder is made.

    Raises:
        ValueError: ``path`` is a folder; ``option`` is who named it.
        OSError: its folder cannot be made.
    """
    if path is not None:
        require(not path.is_dir(), f"{option} must name a file, but {path} is a folder; add a file name")
        path.parent.mkdir(parents=True, exist_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
