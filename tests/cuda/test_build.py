"""What setup.py does with CUDA kernels, shown with a stand-in for nvcc; test_cuda_build.py looks at a real build."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_tools import HOPPER, KERNELS, ROOT, targets_of

SETUP_WITH_CUDA = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda = "13.0"
cpp_extension.CUDA_HOME = sys.argv[1]
cpp_extension.CUDAExtension = cpp_extension.CppExtension  # the real one links against libraries that are not here
def report(self):
    print("objects", *self.extensions[0].extra_objects)
    print("sources", *self.extensions[0].sources)
    print("library_dirs", *self.extensions[0].library_dirs)
cpp_extension.BuildExtension.build_extensions = report
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-temp", sys.argv[2]]
runpy.run_path("setup.py")
"""


class Stand:
    """A CUDA home whose nvcc writes down what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.home, self.temp, self.log = folder / "cuda", folder / "temp", folder / "log"
        self.header = folder / "included.h"
        nvcc = self.home / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(
            f'#!/bin/sh\necho "$@" >> {self.log}\nprintf "$4 : $2 \\\\\n {self.header}\\n" >"$7"\ntouch "$4"\n'
        )
        self.header.touch()
        nvcc.chmod(0o755)
        (self.home / "lib").mkdir()
        (self.home / "lib" / "libcudart.so.13").touch()

    def build(self, architectures: str | None = None) -> dict[str, list[str]]:
        command = [sys.executable, "-c", SETUP_WITH_CUDA, str(self.home), str(self.temp)]
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        env.pop("TORCH_CUDA_ARCH_LIST", None)
        if architectures is not None:
            env["TORCH_CUDA_ARCH_LIST"] = architectures
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        return {words[0]: words[1:] for words in lines if words and words[0] in ("objects", "sources", "library_dirs")}

    def commands(self) -> dict[str, list[str]]:
        """By kernel, since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        found = {Path(words[1]).stem: words for words in map(str.split, lines)}
        assert len(found) == len(lines), "a kernel was compiled twice"
        return found


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


def gencode(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("arch=")}


def test_kernels_are_compiled_for_the_architectures_that_they_are_tested_for(stand: Stand) -> None:
    built = stand.build()
    assert [Path(path).stem for path in built["objects"]] == [path.stem for path in KERNELS]
    assert not any(source.endswith(".cu") for source in built["sources"])
    commands = stand.commands()
    for kernel in KERNELS:
        later = {"arch=compute_80,code=compute_80"} if kernel not in HOPPER else set()
        assert gencode(commands[kernel.stem]) == {*gencode(targets_of(kernel)), *later}, kernel
    stand.build()
    assert not stand.commands(), "unchanged kernels were compiled again"
    os.utime(stand.header, (time.time() + 60, time.time() + 60))
    stand.build()
    assert len(stand.commands()) == len(KERNELS), "a header that they include has changed"


def test_a_build_for_one_architecture(stand: Stand) -> None:
    stand.build()
    stand.commands()
    stand.build("9.0a")
    commands = stand.commands()
    assert set(commands) == {path.stem for path in KERNELS if path not in HOPPER}, "Hopper's are the same as before"
    assert all(gencode(words) == {"arch=compute_90a,code=sm_90a"} for words in commands.values())


def test_the_cuda_runtime_of_pip_packages_can_be_linked(stand: Stand) -> None:
    def linkable() -> list[Path]:
        return [path for folder in stand.build()["library_dirs"] for path in Path(folder).glob("libcudart.so")]

    (link,) = linkable()
    assert link.resolve() == stand.home / "lib" / "libcudart.so.13"
    (stand.home / "lib" / "libcudart.so").touch()
    assert linkable() == [], "a toolkit needs no link"
