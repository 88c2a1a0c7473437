"""Files that are replaced whole or not at all."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one step, so that no reader sees half of it; a link stays one.

    What is no regular file, as a pipe or ``/dev/null``, is written to.

    Raises:
        OSError: it cannot be written; the error names ``path``, and what was there is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if _is_special(path):
            path.write_bytes(data)
            return
        final = Path(os.path.realpath(path))
        draft = _new_file_beside(final)
        try:
            draft.write_bytes(data)
            draft.replace(final)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def try_to_write(path: Path) -> None:
    """Find out whether ``write_whole`` could write ``path``, whose folder exists. Nothing there is changed.

    Raises:
        OSError: it could not; the error names ``path``.
    """
    try:
        if path.is_file():
            os.close(os.open(path, os.O_WRONLY))
        if not _is_special(path):
            _new_file_beside(Path(os.path.realpath(path))).unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _new_file_beside(path: Path) -> Path:
    """A file that was not there before, whatever else is."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(16)}.draft")
    draft.touch(exist_ok=False)
    return draft
