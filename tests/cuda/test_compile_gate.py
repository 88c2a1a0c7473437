"""Compiles CUDA without a GPU and refuses kernels that spill registers or use local memory.

Here are the wrappers and the kernels made for tests; test_sass_gate.py compiles the project's kernels, once each.

A machine without nvcc fails here, on purpose: code that nobody compiles is not built. ``launch/test.sh`` installs
nvcc from pip packages where there is none.
"""

import fcntl
import functools
import os
import re
import sysconfig
from collections.abc import Iterator
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


HOST_MISTAKES = {  # in a launcher: what stands before the launch, its argument, what a template of the host says
    "a word for a number": ('int y = "abc";', "x", ""),
    "an unknown name": ("undeclared(3);", "x", ""),
    "a wrong argument": ("", "3.0", ""),
    "too many arguments": ("", "x, 1", ""),
    "a wrong call of the runtime": ("cudaMemcpyAsync(x, x);", "x", ""),
    "in a template": ("", "x", "int n = x.size();"),
}
LAUNCHER = """
__global__ void twice_kernel(float* x) {{ x[threadIdx.x] *= 2; }}
cudaError_t launch(float* x) {{ {} twice_kernel<<<1, 32, 0, nullptr>>>({}); return cudaGetLastError(); }}
template <class T> cudaError_t launch_typed(T* x) {{ {} return launch(x); }}
cudaError_t go(float* x) {{ return launch_typed<float>(x); }}
"""
# What every wrapper includes by itself, and the compiler therefore need not read ten times.
SHARED_HEADERS = [
    "ATen/ops/empty.h", "c10/cuda/CUDAException.h", "c10/cuda/CUDAGuard.h", "c10/cuda/CUDAStream.h", "torch/library.h",
]  # fmt: skip


@functools.cache
def cuda_includes(nvcc: str) -> list[str]:
    """The folders in which nvcc looks for the CUDA runtime's headers."""
    plan = run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    line = next(line for line in plan.splitlines() if "INCLUDES=" in line)
    return re.findall(r'-I"?([^" ]+)', line)


def compiler_for_wrappers(nvcc: str) -> list[str]:
    folders = [*include_paths(), *cuda_includes(nvcc)]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-DMOETRAIN_WITH_CUDA", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    system = [flag for folder in folders for flag in ("-isystem", folder)]
    return [os.environ.get("CXX", "g++"), *flags, f"-I{ROOT / 'csrc'}", *system]


def check_syntax(nvcc: str, source: Path, *more: str) -> None:
    run([*compiler_for_wrappers(nvcc), "-fsyntax-only", *more, str(source)])


@pytest.fixture(scope="module")
def shared_headers(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A header of ``SHARED_HEADERS`` beside its compiled form (hundreds of megabytes), made by one worker for all."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared_headers"
    folder.mkdir(exist_ok=True)
    header, compiled = folder / "shared.h", folder / "shared.h.gch"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            header.write_text("".join(f"#include <{name}>\n" for name in SHARED_HEADERS))
            run([*compiler_for_wrappers(nvcc), "-x", "c++-header", str(header), "-o", str(compiled)])
    yield header
    compiled.unlink(missing_ok=True)  # a worker that still compiles reads the text instead


def test_there_is_something_to_compile() -> None:
    names = {path.name for path in KERNELS + WRAPPERS}
    assert {"select_experts.cu", "group_pairs.cu", "select_experts_cuda.cpp", "group_pairs_cuda.cpp"} <= names


@pytest.mark.parametrize("source", PORTABLE_TESTS, ids=lambda path: path.stem)
def test_kernels_compile_without_spills(nvcc: str, source: Path) -> None:
    require_registers_suffice(compile_kernels(nvcc, source))


@pytest.mark.parametrize("source", WRAPPERS, ids=lambda path: path.stem)
def test_wrappers_compile(nvcc: str, shared_headers: Path, source: Path) -> None:
    missing = [name for name in SHARED_HEADERS if f"#include <{name}>\n" not in source.read_text()]
    assert not missing, f"{source.name} does not include {missing}, whose lack would not show; shorten SHARED_HEADERS"
    check_syntax(nvcc, source, "-Winvalid-pch", "-include", str(shared_headers))


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


@pytest.mark.parametrize("mistake", HOST_MISTAKES)
def test_a_mistake_in_the_code_of_the_host_is_refused(nvcc: str, tmp_path: Path, mistake: str) -> None:
    right, wrong = tmp_path / "right_sm90.cu", tmp_path / "wrong_sm90.cu"
    right.write_text(LAUNCHER.format("", "x", ""))
    wrong.write_text(LAUNCHER.format(*HOST_MISTAKES[mistake]))
    require_registers_suffice(compile_kernels(nvcc, right))
    with pytest.raises(AssertionError, match=r"wrong_sm90\.cu\(\d+\): error"):
        compile_kernels(nvcc, wrong)


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
