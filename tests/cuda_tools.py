"""The CUDA compiler and disassembler, wherever they are, and what ptxas says of a kernel's registers."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
TEST_KERNELS = sorted((ROOT / "tests" / "cuda" / "compiled").glob("*.cu"))
HOPPER = [path for path in KERNELS if path.stem.endswith("_sm90")]
RESOURCES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
PACKAGES = {
    "nvcc": "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl",
    "nvdisasm": "--no-deps nvidia-cuda-nvdisasm",
    "cuobjdump": "--no-deps nvidia-cuda-cuobjdump",
}


def find_tool(name: str) -> str:
    on_path = shutil.which(name)
    if on_path:
        return on_path
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    folders += sorted((Path(sysconfig.get_paths()["purelib"]) / "nvidia").glob("*/bin"))
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    pytest.fail(
        f"no {name} on PATH, in CUDA_HOME or among the pip packages; install it with: pip install {PACKAGES[name]}"
    )


def targets_of(source: Path) -> list[str]:
    """``-gencode`` flags for the architectures that the file's name implies."""
    architectures = ["90a"] if source.stem.endswith("_sm90") else ["80", "90a"]
    return [flag for arch in architectures for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}\n{output}"
    return output


def compile_kernels(nvcc: str, source: Path, *more: str) -> str:
    """What ptxas says of a .cu; fails where nvcc refuses its device or host code.

    The code of the host is checked and not generated (-fatbin): nobody here would run it, and it is a quarter of the
    time.
    """
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", *more]
    return run([nvcc, "-fatbin", str(source), "-o", os.devnull, *flags, *targets_of(source)])


def require_registers_suffice(ptxas_output: str) -> None:
    usages = RESOURCES.findall(ptxas_output)
    assert usages, f"ptxas reported no kernel:\n{ptxas_output}"
    for stack, stores, loads in usages:
        assert (stack, stores, loads) == ("0", "0", "0"), (
            f"a kernel has {stack} bytes of stack frame, {stores} of spill stores and {loads} of spill loads; "
            f"all must be 0:\n{ptxas_output}"
        )
