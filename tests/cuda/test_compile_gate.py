"""Compiles CUDA without a GPU and refuses kernels that spill registers or use local memory.

Here are the wrappers and the kernels made for tests; test_sass_gate.py compiles the project's kernels, once each.

A machine without nvcc fails here, on purpose: code that nobody compiles is not built. ``launch/test.sh`` installs
nvcc from pip packages where there is none.
"""

import os
import re
import sysconfig
from pathlib import Path

import pytest
from cuda_tools import (
    KERNELS,
    ROOT,
    TEST_KERNELS,
    compile_kernels,
    find_tool,
    require_registers_suffice,
    run,
    targets_of,
)
from torch.utils.cpp_extension import include_paths

PORTABLE_TESTS = [path for path in TEST_KERNELS if not path.stem.endswith("_sm90")]
WRAPPERS = sorted((ROOT / "csrc" / "ops").rglob("*_cuda.cpp"))

CLEAN_KERNEL = "__global__ void twice_kernel(float* x) { x[threadIdx.x] *= 2; }"
LOCAL_ARRAY_KERNEL = """
__global__ void local_array_kernel(const int* place, float* x) {
    float local[64];
    for (int i = 0; i < 64; ++i) local[place[i]] = x[i];
    x[threadIdx.x] = local[place[threadIdx.x]];
}
"""
SPILLING_KERNEL = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* y) {
    float live[96];
    #pragma unroll
    for (int i = 0; i < 96; ++i) live[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = live[i] * live[(i * 37 + 11) % 96];
}
"""


def cuda_includes(nvcc: str) -> list[str]:
    """The folders in which nvcc looks for the CUDA runtime's headers."""
    plan = run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    line = next(line for line in plan.splitlines() if "INCLUDES=" in line)
    return re.findall(r'-I"?([^" ]+)', line)


def check_syntax(nvcc: str, source: Path) -> None:
    folders = [*include_paths(), *cuda_includes(nvcc)]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-DMOETRAIN_WITH_CUDA", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    system = [flag for folder in folders for flag in ("-isystem", folder)]
    run([os.environ.get("CXX", "g++"), "-fsyntax-only", *flags, f"-I{ROOT / 'csrc'}", *system, str(source)])


def test_there_is_something_to_compile() -> None:
    names = {path.name for path in KERNELS + WRAPPERS}
    assert {"select_experts.cu", "group_pairs.cu", "select_experts_cuda.cpp", "group_pairs_cuda.cpp"} <= names


@pytest.mark.parametrize("source", PORTABLE_TESTS, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(nvcc: str, source: Path) -> None:
    require_registers_suffice(compile_kernels(nvcc, source))


@pytest.mark.parametrize("source", WRAPPERS, ids=lambda path: path.stem)
def test_wrappers_compile(nvcc: str, source: Path) -> None:
    check_syntax(nvcc, source)


def test_targets_follow_the_name() -> None:
    assert [flag for flag in targets_of(Path("x.cu")) if "sm_80" in flag]
    assert [flag for flag in targets_of(Path("x.cu")) if "sm_90a" in flag]
    assert targets_of(Path("x_sm90.cu")) == ["-gencode", "arch=compute_90a,code=sm_90a"]


def test_a_clean_kernel_passes(nvcc: str, tmp_path: Path) -> None:
    source = tmp_path / "clean.cu"
    source.write_text(CLEAN_KERNEL)
    require_registers_suffice(compile_kernels(nvcc, source))


@pytest.mark.parametrize("text", [LOCAL_ARRAY_KERNEL, SPILLING_KERNEL], ids=["local array", "spills"])
def test_a_kernel_that_leaves_registers_is_refused(nvcc: str, tmp_path: Path, text: str) -> None:
    source = tmp_path / "bad_sm90.cu"
    source.write_text(text)
    output = compile_kernels(nvcc, source)
    with pytest.raises(AssertionError, match="bytes of stack frame"):
        require_registers_suffice(output)


def test_a_silent_compiler_is_refused() -> None:
    with pytest.raises(AssertionError, match="ptxas reported no kernel"):
        require_registers_suffice("")


def test_a_broken_wrapper_is_refused(nvcc: str, tmp_path: Path) -> None:
    source = tmp_path / "broken_cuda.cpp"
    source.write_text("#include <c10/cuda/CUDAStream.h>\nint stream = c10::cuda::getCurrentCUDAStream;\n")
    with pytest.raises(AssertionError, match="getCurrentCUDAStream"):
        check_syntax(nvcc, source)


def test_a_missing_nvcc_fails_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(pytest.fail.Exception, match="pip install nvidia-cuda-nvcc"):
        find_tool("nvcc")
