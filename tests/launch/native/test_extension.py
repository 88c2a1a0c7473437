"""What setup.py compiles, and when again, shown with a stand-in for the compilers; tests/cuda looks at a real build."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_tools import HOPPER, KERNELS, ROOT, targets_of

from launch.native.isas import ISAS

SOURCES = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cpp") if "emulation" not in path.parts}
ON_CUDA = {path for path in SOURCES if path.stem.endswith("_cuda")}
ISA_SOURCES = {isa: Path("csrc/cpu/isa", f"isa_{isa}.cpp") for isa in ISAS}


class Stand:
    """A torch of empty folders, a CUDA home, and compilers that write down what they were asked for."""

    def __init__(self, folder: Path) -> None:
        self.root, self.folder, self.log, self.header = ROOT, folder, folder / "log", folder / "included.h"
        self.header.touch()
        self.compiler = self.program("g++")
        self.home = folder / "cuda"
        self.program("cuda/bin/nvcc")
        (self.home / "lib").mkdir()
        (self.home / "lib" / "libcudart.so.13").touch()
        self.env = {"MOETRAIN_BUILD_ISA": "all", "MOETRAIN_COMPILER_CACHE": "none", "CUDA_HOME": str(self.home)}

    def program(self, name: str) -> Path:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(__file__).with_name("stand_in_compiler.sh"), target)
        target.chmod(0o755)
        return target

    def environment(self, *, cuda: bool, env: dict[str, str]) -> dict[str, str]:
        torch = self.folder / "packages" / "torch"
        torch.mkdir(parents=True, exist_ok=True)
        (torch / "__init__.py").write_text("raise ImportError('the build must not import torch')")
        (torch / "version.py").write_text(f"__version__ = '2.99'\ncuda = {'13.0' if cuda else None!r}\n")
        clean = {name: value for name, value in os.environ.items() if name not in ("TORCH_CUDA_ARCH_LIST", "CXXFLAGS")}
        clean |= {"PYTHONPATH": str(torch.parent), "LOG": str(self.log), "INCLUDED": str(self.header)}
        return {**clean, "CXX": str(self.compiler), **self.env, **env}

    def run(self, *, cuda: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(self.folder / "lib")]
        if self.root == ROOT:
            command += ["--build-temp", str(self.folder / "temp")]
        environment = self.environment(cuda=cuda, env=env)
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    def build(self, *, cuda: bool = False, **env: str) -> dict[Path, list[str]]:
        """What was compiled, by source (those of one unit share a command), and linked, by library."""
        self.log.unlink(missing_ok=True)
        done = self.run(cuda=cuda, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []
        commands: dict[Path, list[str]] = {}
        for words in lines:
            made_of = Path(words[words.index("-c" if "-c" in words else "-o") + 1])
            parts = [made_of]
            if made_of.parent.name == "units":
                parts = [Path("csrc", line.split('"')[1]) for line in (self.root / made_of).read_text().splitlines()]
            for part in parts:
                assert part not in commands, "something was compiled twice"
                commands[part] = words
        return commands

    @property
    def library(self) -> Path:
        (found,) = (self.folder / "temp").glob("_C.*so")
        return found

    def touch(self, path: Path) -> None:
        os.utime(path, (time.time() + 60, time.time() + 60))


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


def gencode(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("arch=")}


def test_without_cuda_the_cpu_part_is_compiled_and_linked_into_the_package(stand: Stand) -> None:
    commands = stand.build()
    assert set(commands) == {*(SOURCES - ON_CUDA), stand.library}
    objects = {words[words.index("-o") + 1] for words in commands.values() if "-c" in words}
    assert objects == {word for word in commands[stand.library] if word.endswith(".o")}
    assert list((stand.folder / "lib" / "moetrain").glob("_C.*so"))
    assert not stand.build(), "nothing has changed"


def test_what_has_changed_is_compiled_and_linked_again(stand: Stand) -> None:
    stand.build()
    stand.touch(stand.header)
    again = stand.build()
    assert set(again) == {*(path for path in SOURCES if path.match("csrc/ops/*/*_cpu.cpp")), stand.library}
    assert set(stand.build(CXXFLAGS="-O1")) == {*(SOURCES - ON_CUDA), stand.library}, "another command"


def test_another_choice_of_instruction_sets_compiles_what_is_new_and_links_again(stand: Stand) -> None:
    native = stand.build(MOETRAIN_BUILD_ISA="native")
    chosen = {ISA_SOURCES["avx2"], ISA_SOURCES["portable"]}
    assert set(native) & set(ISA_SOURCES.values()) == chosen
    folders = ("csrc/cpu/*/*.cpp", "csrc/planner/*.cpp", "csrc/planner/*/*.cpp")
    cloned = {path for path in SOURCES if any(path.match(folder) for folder in folders)}
    cloned -= set(ISA_SOURCES.values())
    assert set(stand.build()) == {*(set(ISA_SOURCES.values()) - chosen), *cloned, stand.library}
    assert set(stand.build(MOETRAIN_BUILD_ISA="portable")) == {stand.library}, "clones are those of all"


def test_an_unknown_instruction_set_ends_the_build_with_those_that_there_are(stand: Stand) -> None:
    done = stand.run(MOETRAIN_BUILD_ISA="sse9")
    assert done.returncode != 0
    assert "moetrain: MOETRAIN_BUILD_ISA must be native, all or a list of amx" in done.stderr


def test_a_compiler_cache_is_used_where_there_is_one(stand: Stand) -> None:
    cache = stand.program("path/ccache")
    path = f"{cache.parent}:{os.environ['PATH']}"
    commands = stand.build(PATH=path, MOETRAIN_COMPILER_CACHE="")
    assert {words[0] for words in commands.values()} == {"ccache", "g++"}
    assert commands[stand.library][0] == "g++", "nothing to cache"
    stand.log.unlink()
    assert not stand.build(PATH=path, MOETRAIN_COMPILER_CACHE="")
    assert {words[0] for words in stand.build(PATH=path).values()} == {"g++"}, "none is wanted"


def test_a_cache_that_is_not_there_is_refused(stand: Stand) -> None:
    done = stand.run(MOETRAIN_COMPILER_CACHE="no-such-cache")
    assert done.returncode != 0
    assert "moetrain: MOETRAIN_COMPILER_CACHE names no-such-cache, which is not there" in done.stderr


def test_commands_name_what_is_in_this_folder_without_the_folder(stand: Stand) -> None:
    """So that a compiler cache finds them again for another clone."""
    for source, words in stand.build().items():
        assert not [word for word in words if str(ROOT) in word], source


def test_what_needs_no_torch_is_compiled_before_torch_is_there_and_not_again(stand: Stand) -> None:
    stand.root = stand.folder / "clone"
    for name in ("csrc", "launch/native"):
        shutil.copytree(ROOT / name, stand.root / name)
    (stand.root / "moetrain").mkdir()
    for name in ("setup.py", "pyproject.toml", "moetrain/__init__.py"):
        shutil.copy(ROOT / name, stand.root / name)
    early = stand.environment(cuda=False, env={"PYTHONPATH": str(stand.root)})
    subprocess.run([sys.executable, "-m", "launch.native.kernels"], cwd=stand.root, env=early, check=True)
    compiled = {line.split()[line.split().index("-c") + 1] for line in stand.log.read_text().splitlines()}
    assert compiled == {str(source) for source in ISA_SOURCES.values()}
    assert "torch" not in stand.log.read_text()
    assert not set(stand.build()) & set(ISA_SOURCES.values())
    assert not stand.build(), "nothing has changed"


def test_kernels_are_compiled_for_the_architectures_that_they_are_tested_for(stand: Stand) -> None:
    commands = stand.build(cuda=True)
    kernels = {path.relative_to(ROOT): path for path in KERNELS}
    assert set(commands) == {*SOURCES, *kernels, stand.library}
    for source, path in kernels.items():
        later = {"arch=compute_80,code=compute_80"} if path not in HOPPER else set()
        assert commands[source][0] == "nvcc"
        assert gencode(commands[source]) == {*gencode(targets_of(path)), *later}, source
    assert "-ltorch_cuda" in commands[stand.library]
    assert all("-DMOETRAIN_WITH_CUDA" in commands[source] for source in SOURCES - set(ISA_SOURCES.values()))
    assert not stand.build(cuda=True), "unchanged kernels were compiled again"
    stand.touch(stand.header)
    again = set(stand.build(cuda=True))
    assert again & set(kernels) == {Path("csrc/cuda/rows/gather_rows.cu")}
    assert again & ON_CUDA == {Path("csrc/ops/rows/gather_rows_cuda.cpp")}


def test_a_build_for_one_architecture(stand: Stand) -> None:
    stand.build(cuda=True)
    commands = stand.build(cuda=True, TORCH_CUDA_ARCH_LIST="9.0a")
    changed = {path.relative_to(ROOT) for path in KERNELS if path not in HOPPER}
    assert set(commands) == {*changed, stand.library}, "Hopper's are the same as before"
    assert all(gencode(commands[source]) == {"arch=compute_90a,code=sm_90a"} for source in changed)


def test_the_cuda_runtime_of_pip_packages_can_be_linked(stand: Stand) -> None:
    def linkable() -> list[Path]:
        (stand.folder / "temp" / "build.ninja").unlink(missing_ok=True)
        stand.build(cuda=True)
        text = (stand.folder / "temp" / "build.ninja").read_text()
        folders = [word.removeprefix("-L") for word in text.split() if word.startswith("-L")]
        return [path for folder in folders for path in Path(folder).glob("libcudart.so")]

    (link,) = linkable()
    assert link.resolve() == stand.home / "lib" / "libcudart.so.13"
    (stand.home / "lib" / "libcudart.so").touch()
    assert linkable() == [stand.home / "lib" / "libcudart.so"], "a toolkit needs no link"
