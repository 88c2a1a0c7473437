"""Whether the compiled extension fits the torch at hand, found without loading it.

libtorch's C++ interface changes from one minor version to the next. An extension of another one may miss symbols, which
says little to whoever reads it, or load and be wrong.
"""

import importlib.util
import re
from pathlib import Path

MARK = re.compile(rb"moetrain built with torch (\d+\.\d+)([\w.+-]*)")  # csrc/bindings.cpp writes it
BUILD = "pip install --no-build-isolation --no-deps -e . (in the source folder)"


def library() -> Path | None:
    """The extension's file, or None where it is not built."""
    spec = importlib.util.find_spec("moetrain._C")
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def require_fit(library: Path, torch_version: str) -> None:
    """Refuse an extension that was built with another minor version of torch; one without a mark is let through.

    Args:
        library: the extension's file.
        torch_version: of the torch at hand, such as ``2.13.0+cpu``.

    Raises:
        ImportError: they differ.
    """
    mark = MARK.search(library.read_bytes())
    if mark is None:
        return
    minor, rest = (part.decode() for part in mark.groups())
    if torch_version.split(".")[:2] != minor.split("."):
        raise ImportError(
            f"moetrain's native operators were built with torch {minor}{rest}, and this environment has torch "
            f"{torch_version}: libtorch's C++ interface holds within one minor version. Install the torch that fits, "
            f"pip install 'torch=={minor}.*', or build moetrain against this one: {BUILD}"
        )
