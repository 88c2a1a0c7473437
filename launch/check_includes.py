"""Checks what the files of csrc include, as import-linter does for Python: prints what breaks a rule, exits with 1.

    python launch/check_includes.py [FOLDER]    FOLDER holds csrc; by default that of the project

Rooms, each of which includes itself and those below it; rooms of one line do not include one another:

    bindings.cpp
    ops
    cpu | cuda | planner | comm
    common

Own headers are included by their path below csrc, in quotes. Of torch a room includes what TORCH names for it. What is
compiled where there is no CUDA reaches no header of cuda/, by any way. The folder common/ of a room includes no other
folder of it (but cuda/ptx/, on which everything in cuda/ stands).
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEVELS = (("bindings",), ("ops",), ("cpu", "cuda", "planner", "comm"), ("common",))
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# Headers of torch and Python, by the longest prefix of the including file's path: the beginnings of what it may name.
# What is compiled once per instruction set has none: the linker could take a function of theirs, compiled for AVX-512,
# for one that the rest of the library calls on a machine without it.
TORCH = {
    "bindings.cpp": ("Python.h", "c10/util/Exception.h", "torch/headeronly/version.h"),
    "ops/": ("ATen/", "c10/", "torch/library.h"),
    "cpu/": ("ATen/Parallel.h", "c10/core/ScalarType.h", "c10/util/BFloat16.h", "c10/util/Half.h"),
    "cpu/isa/isa.cpp": ("c10/util/Exception.h",),
    **dict.fromkeys(("cpu/attention/", "cpu/expert_mlp/", "cpu/isa/", "cpu/tiles/"), ()),
    "comm/transfer/": ("ATen/", "c10/", "torch/csrc/distributed/c10d/ProcessGroup.hpp"),
    **dict.fromkeys(("cuda/", "planner/", "comm/", "common/"), ()),
}
FOREIGN = re.compile(r"(ATen|c10|torch|pybind11)/|Python\.h$")
CUDA = re.compile(r"cuda[\w]*\.h$|cuda_|cub/|cute/|cutlass/")
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)
SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}


@dataclass(frozen=True, slots=True)
class Include:
    """One line of a file; paths below csrc."""

    file: str
    line: int
    quoted: bool
    header: str

    def breaks(self, rule: str) -> str:
        """What to print."""
        return f"csrc/{self.file}:{self.line} includes {self.header}: {rule}"


def room_of(path: str) -> str:
    """The first folder of a path below csrc, or the name of a file that lies in none."""
    return path.partition("/")[0].partition(".")[0]


def includes_of(csrc: Path) -> list[Include]:
    """Every include of every source file, in the order of paths and lines."""
    found = []
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        text = path.read_text()
        for match in INCLUDE.finditer(text):
            line = 1 + text.count("\n", 0, match.start(1))
            found.append(Include(path.relative_to(csrc).as_posix(), line, match[1] == '"', match[2]))
    return found


def broken_by_path(include: Include, csrc: Path) -> Iterator[str]:
    """Own headers by their path below csrc, in quotes; all others in angle brackets."""
    own = (csrc / include.header).is_file() and ".." not in Path(include.header).parts
    if include.quoted and not own:
        yield include.breaks("a header in quotes is one of csrc, by its path below csrc")
    if own and not include.quoted:
        yield include.breaks("headers of csrc stand in quotes")


def broken_by_layer(include: Include) -> Iterator[str]:
    """Own headers lie in the same room, or below it."""
    if not include.quoted:
        return
    room, other = room_of(include.file), room_of(include.header)
    for name in (room, other):
        if name not in LEVEL_OF:
            yield include.breaks(f"{name}/ is no room; rooms are {', '.join(LEVEL_OF)}")
            return
    if room != other and LEVEL_OF[room] >= LEVEL_OF[other]:
        yield include.breaks(f"{room} is not above {other}; includes point down, see launch/check_includes.py")
    allowed = (f"{room}/common/", "cuda/ptx/")
    if include.file.startswith(f"{room}/common/") and room == other and not include.header.startswith(allowed):
        yield include.breaks(f"{room}/common/ is what the other folders of {room}/ stand on")


def broken_by_torch(include: Include) -> Iterator[str]:
    """A file includes of torch, Python and CUDA what its room may."""
    if include.quoted:
        return
    if FOREIGN.match(include.header):
        rooms = [prefix for prefix in TORCH if include.file.startswith(prefix)]
        allowed = TORCH[max(rooms, key=len)] if rooms else ()
        if not include.header.startswith(allowed):
            yield include.breaks(f"of torch and Python it may include {', '.join(allowed) or 'nothing'}")
    elif CUDA.match(include.header) and room_of(include.file) in ("cpu", "common"):
        yield include.breaks("headers of CUDA are for cuda/ and the CUDA side of ops/")


def broken_by_cuda(includes: list[Include]) -> Iterator[str]:
    """Sources that are compiled without CUDA too reach nothing of cuda/."""
    headers: dict[str, list[Include]] = {}
    for include in includes:
        headers.setdefault(include.file, []).append(include)
    for source in headers:
        if not source.endswith(".cpp") or source.endswith("_cuda.cpp"):
            continue
        reached, left = {source}, [source]
        while left:
            for include in headers.get(left.pop(), ()):
                if include.header.startswith("cuda/"):
                    yield include.breaks(f"csrc/{source} reaches it, which is compiled without CUDA too")
                elif include.header not in reached:
                    reached.add(include.header)
                    left.append(include.header)


def broken_rules(csrc: Path) -> list[str]:
    """A line for each include that breaks a rule.

    Raises:
        ValueError: there are no includes: the folder is not what it should be.
    """
    includes = includes_of(csrc)
    if not includes:
        raise ValueError(f"check_includes: found no include below {csrc}; name the folder that holds csrc")
    each = [
        rule
        for include in includes
        for rule in (*broken_by_path(include, csrc), *broken_by_layer(include), *broken_by_torch(include))
    ]
    return [*each, *broken_by_cuda(includes)]


def main(arguments: list[str]) -> int:
    """Print what is broken; 1 where anything is."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    broken = broken_rules(folder / "csrc")
    print("\n".join(broken) or f"includes of {folder / 'csrc'} point down")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
