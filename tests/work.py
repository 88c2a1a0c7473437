"""How much work something is, counted in what it runs and imports, which no other load of the machine changes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_RUN_AND_LIST = """
import sys
before = set(sys.modules)
import runpy
sys.argv[0] = "moetrain"
try:
    runpy.run_module("moetrain", run_name="__main__")
finally:
    new = (name.partition(".")[0] for name in set(sys.modules) - before if getattr(sys.modules[name], "__spec__", None))
    print(*sorted(set(new) - sys.stdlib_module_names))
"""


class Lines:
    """A number of lines run."""

    count = 0


@contextmanager
def counted_lines() -> Iterator[Lines]:
    """Count the lines of Python that run inside."""
    lines, before = Lines(), sys.gettrace()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        lines.count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def run_and_list_packages(*arguments: str) -> tuple[int, str, str, list[str]]:
    """Run ``python -m moetrain``: exit code, output, errors, and the packages beside Python's own that it imported."""
    command = [sys.executable, "-c", _RUN_AND_LIST, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    *said, packages = done.stdout.splitlines(keepends=True)
    return done.returncode, "".join(said), done.stderr, packages.split()
