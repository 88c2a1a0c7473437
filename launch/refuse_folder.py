"""Makes a Python refuse to read from a folder: wheel_try.sh puts it into the environment in which a wheel is tried."""

import os
import sys


def install() -> None:
    """Refuse files below ``REFUSED_FOLDER`` from now on, and note each in the file ``REFUSALS``, where both are set."""
    folder, refusals = os.environ.get("REFUSED_FOLDER"), os.environ.get("REFUSALS")
    if not folder or not refusals:
        return
    start = os.path.join(os.path.realpath(folder), "")

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event not in ("open", "import"):
            return
        path = arguments[1 if event == "import" else 0]  # of an import the file, which an extension's loader opens
        if not isinstance(path, (str, bytes)):
            return
        full = os.path.abspath(os.fsdecode(path))
        if not full.startswith(start):
            return
        with open(refusals, "a") as notes:  # some caller may swallow the error
            notes.write(f"{full}\n")
        raise RuntimeError(f"{full} is in {folder}, of which nothing may be read here")

    sys.addaudithook(refuse)
