"""Builds C++ tests of CUDA kernels against the emulation in tests/cuda/emulation, breaks kernels on purpose, runs both.

A test is ``tests/cuda/emulated/test_AREA.cpp``, a program that prints ``ok`` or ``FAIL`` per case. Binaries lie in
``build/emulated`` under a hash of all that went into them, so that an unchanged one is not built again.
"""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
TESTS = ROOT / "tests" / "cuda" / "emulated"
EMULATION = ROOT / "tests" / "cuda" / "emulation"
BUILD = ROOT / "build" / "emulated"
# CPU kernels that tests include, to compare with; `host` in the tests stands in for the little of torch that these use.
TWINS: tuple[str, ...] = ("cpu/rounding/*.h", "cpu/rounding/round_pairs.cpp")
TWINS += (
    "cpu/rounding/offer_pairs.cpp",
    "cpu/common/tasks.h",
    "cpu/routing/assign_seats.h",
    "cpu/routing/assign_seats.cpp",
)
# What a build may read; of csrc, the other folders are no part of the kernels or of what tests compare them with.
INPUTS = ("common/*.h", "cuda/**/*.h", "cuda/**/*.cuh", "cuda/**/*.cu", "ops/**/*.h", *TWINS)
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-DMOETRAIN_MAX_BLOCKS=3"]  # of a simple kernel's grid, which then strides
SANITIZE = ["-g", "-fsanitize=address", "-D_GLIBCXX_ASSERTIONS"]
# A test names the .cu files it needs: // Kernel: rows/gather_rows.cu
KERNELS = re.compile(r"^// Kernel: (\S+)$", re.MULTILINE)
INCLUDE = re.compile(r'^ *# *include *(["<])([^">]+)[">]', re.MULTILINE)
LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\(", re.DOTALL)
DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
SHARED = re.compile(r"__shared__ ([\w:<>, ]+?) (\w+)((?:\[[^\]]*\])*);")
SAMPLE_SIZE = 2  # mutants of each list that run every time


@dataclass(frozen=True, slots=True)
class Mutant:
    """One edit of a kernel, and what the test must then say (a regular expression over its output)."""

    name: str
    file: str  # below csrc/cuda, or kernels/X.h of the tests
    old: str
    new: str
    symptom: str


def compiler() -> str:
    """The C++ compiler; emulated kernels need one that knows C++20 and ucontext."""
    return os.environ.get("CXX", "g++")


def run(command: Sequence[str | Path], timeout: float = 250) -> subprocess.CompletedProcess[str]:
    """Run a command, its output as text; its exit code is the caller's to judge."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, check=False)


def inputs_of(csrc: Path) -> list[Path]:
    """Everything below `csrc` that a build may read."""
    return sorted({path for pattern in INPUTS for path in csrc.glob(pattern)})


def emulation() -> list[Path]:
    """The sources of the block runner and the headers that stand in for CUDA's."""
    return tests_of(EMULATION)


def folders_of(csrc: Path) -> list[Path]:
    """The folders that a kernel's headers come from on the host, the emulation's first."""
    return [EMULATION / "include", EMULATION.parent, csrc]


def includes_of(csrc: Path) -> list[str]:
    """These folders, as the compiler wants to be told."""
    return [f"-I{folder}" for folder in folders_of(csrc)]


def read_by(source: Path, folders: Sequence[Path]) -> list[Path]:
    """The source and all of ours that it includes, directly or not, whatever the conditions around an #include."""
    found, left = {source}, [source]
    while left:
        reader = left.pop()
        for mark, name in INCLUDE.findall(reader.read_text()):
            places = [reader.parent, *folders] if mark == '"' else folders
            path = next((place / name for place in places if (place / name).is_file()), None)
            assert path is not None or mark == "<", f"{reader.name} includes {name}, which is in none of {places}"
            if path is not None and path not in found:
                found.add(path)
                left.append(path)
    return sorted(found, key=lambda path: (path.name, path.read_bytes()))


def tests_of(tests: Path) -> list[Path]:
    """The C++ of the tests: programs, and kernels made for them."""
    return sorted(path for path in tests.rglob("*") if path.suffix in {".cpp", ".h"})


@functools.cache
def hash_of(*paths: Path) -> str:
    """One hash over names and contents."""
    digest = hashlib.sha256(run([compiler(), "--version"]).stdout.encode())
    for path in paths:
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_to(target: Path, arguments: Sequence[str | Path]) -> Path:
    """Run the compiler, unless `target` is there; a run beside this one waits for it, and never sees half a file."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}{target.suffix}")
            done = run([compiler(), *arguments, "-o", unfinished])
            assert done.returncode == 0, f"{target.name} does not compile:\n{done.stderr}"
            unfinished.rename(target)
    return target


def build(area: str, broken: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """The binary of ``test_AREA.cpp``, over the kernels of the project or over what `mutate` made in `broken`.

    The block runner is always the project's own. So is every object that reads nothing of what is broken.
    """
    csrc, tests, folder = (broken / "csrc", broken / "tests", broken) if broken else (CSRC, TESTS, BUILD)
    source = tests / f"test_{area}.cpp"
    own = Compilation(folder, [*folders_of(csrc), tests, tests / "host"], [*FLAGS, *flags])
    runner = Compilation(BUILD, folders_of(CSRC), [*FLAGS, *flags])
    objects = [runner.object_of(path) for path in emulation() if path.suffix == ".cpp"]
    objects += [own.object_of(csrc / "cuda" / name) for name in KERNELS.findall(source.read_text())]
    objects.append(own.object_of(source))
    mark = hashlib.sha256(" ".join([*own.flags, *(path.name for path in objects)]).encode()).hexdigest()[:16]
    return compile_to(folder / f"test_{area}.{mark}", [*own.flags, *objects])


@dataclass(frozen=True, slots=True)
class Compilation:
    """How objects are made, and where they go where they are not the project's own."""

    folder: Path
    folders: list[Path]  # of headers
    flags: list[str]

    def object_of(self, source: Path) -> Path:
        """The object of a .cpp or a .cu, under a hash of all that it reads."""
        includes = [f"-I{folder}" for folder in self.folders]
        first = [EMULATION / "include" / "cuda_runtime.h"] if source.suffix == ".cu" else []
        read = {path: None for start in (source, *first) for path in read_by(start, self.folders)}
        mark = hashlib.sha256(" ".join([hash_of(*read), *self.flags]).encode()).hexdigest()[:16]
        name = f"{source.stem}.{mark}.o"
        if (BUILD / name).exists():
            return BUILD / name
        text = rewrite_kernel(source, self.folder) if source.suffix == ".cu" else source
        return compile_to(self.folder / name, [*self.flags, *includes, "-c", text])


def rewrite_kernel(source: Path, folder: Path) -> Path:
    """A C++ file of a .cu: launches become calls, ``__shared__`` variables references into the emulated block."""
    text = source.read_text()
    text = LAUNCH.sub(r"moetrain::emulation::launch(\2)([](auto... arguments) { \1(arguments...); }, ", text)
    text = DYNAMIC_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(moetrain::ptx::dynamic_shared_memory());", text)
    text = SHARED.sub(r'auto& \2 = moetrain::emulation::shared_variable<\1\3>(__PRETTY_FUNCTION__, "\2");', text)
    target = folder / f"{source.stem}.{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f'#include "cuda_runtime.h"\n#line 1 "{source}"\n{text}')
    return target


def run_area(area: str, flags: Sequence[str] = ()) -> None:
    """Build and run one test; it must print at least one ``ok`` and no ``FAIL``."""
    done = run([build(area, flags=flags)])
    assert done.returncode == 0, f"test_{area}:\n{done.stdout}{done.stderr}"
    assert re.search(r"^ok ", done.stdout, re.MULTILINE), f"test_{area} ran nothing:\n{done.stdout}"


def source_of(mutant: Mutant) -> Path:
    """The file that the mutant edits a copy of."""
    return (TESTS if mutant.file.startswith("kernels/") else CSRC / "cuda") / mutant.file


def mutate(mutant: Mutant, folder: Path) -> None:
    """Copy the kernels into `folder`/csrc and the tests into `folder`/tests, with the mutant's edit."""
    copies = {path: folder / "csrc" / path.relative_to(CSRC) for path in inputs_of(CSRC)}
    copies |= {path: folder / "tests" / path.relative_to(TESTS) for path in tests_of(TESTS)}
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    target = copies[source_of(mutant)]
    text = target.read_text()
    assert mutant.old in text, f"the text to replace is not in {mutant.file}: {mutant.old}"
    target.write_text(text.replace(mutant.old, mutant.new))


def require_caught(area: str, mutant: Mutant, folder: Path) -> None:
    """Break the kernel as the mutant says: the test of `area` must fail, and say why."""
    mutate(mutant, folder)
    done = run([build(area, folder)])
    assert done.returncode != 0, f"not noticed: {mutant.name}"
    end = f"\nended by signal {-done.returncode}\n" if done.returncode < 0 else ""
    assert re.search(mutant.symptom, done.stdout + done.stderr + end), (
        f"noticed, but without {mutant.symptom!r}: {mutant.name}\n{done.stdout[:2000]}{done.stderr[:2000]}"
    )


def mutant_params(mutants: Sequence[Mutant]) -> list[Any]:
    """Pytest parameters: all mutants, of which an ordinary run takes a few, others whenever the sources change."""
    turn = int(hash_of(*inputs_of(CSRC), *emulation()), 16)
    sample = {(turn + i * len(mutants) // SAMPLE_SIZE) % len(mutants) for i in range(SAMPLE_SIZE)}
    return [
        pytest.param(mutant, id=mutant.name, marks=() if i in sample else pytest.mark.slow)
        for i, mutant in enumerate(mutants)
    ]
