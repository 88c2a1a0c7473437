"""Files that a command writes its result to."""

from pathlib import Path

from moetrain.config.errors import require
from moetrain.config.files import try_to_write, write_whole


def require_file(option: str, path: Path | None) -> None:
    """See to it that a result can be written, before hours are spent on it. The file's folder is made.

    Raises:
        ValueError: ``path`` is a folder, or cannot be written; ``option`` is who named it.
    """
    if path is not None:
        require(not path.is_dir(), f"{option} must name a file, but {path} is a folder; add a file name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try_to_write(path)
        except OSError as error:
            raise ValueError(_unwritable(option, path, error)) from error


def write_file(option: str, path: Path, text: str) -> None:
    """Write whole or not at all.

    Raises:
        ValueError: it cannot be written; ``option`` is who named it.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise ValueError(_unwritable(option, path, error)) from error


def _unwritable(option: str, path: Path, error: OSError) -> str:
    return (
        f"{option} must name a file that can be written, but {path} cannot: {error.strerror}; name one in a folder of "
        "yours that has room"
    )
