"""Operators' CUDA side as it stands in csrc/ops, compiled for the host: their launchers run under the emulation.

The operator is compiled against stand-ins for torch's CUDA headers (tests/cuda/emulated/torch) that pretend a Hopper
GPU of three multiprocessors; MOETRAIN_CUDA_PATH=sm80 runs the kernels of Ampere on it. What a test over these shows:
pointers, strides, shapes, order and lists that the operator hands to the kernels, and the choice between kernels.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from emulated_kernels import (
    BUILD,
    CSRC,
    FLAGS,
    TESTS,
    compile_to,
    emulation,
    hash_of,
    includes_of,
    inputs_of,
    rewrite_kernel,
    tests_of,
)
from torch.utils.cpp_extension import include_paths, library_paths

GLUE = TESTS / "torch"
FOLDER = BUILD / "operator"
ARCHITECTURES = ("sm90", "sm80")
LAUNCHERS = sorted(
    str(path.relative_to(CSRC / "cuda"))
    for folder in ("grouped_gemm/sm90", "grouped_gemm/sm80", "expert_mlp")
    for path in (CSRC / "cuda" / folder).rglob("*.cu")
)


def folder_of(operator: str) -> Path:
    """Where the operator's family lies, below csrc."""
    (found,) = (CSRC / "ops").glob(f"*/{operator}_cuda.cpp")
    return found.parent.relative_to(CSRC)


def source_of(operator: str) -> Path:
    """The operator's file in csrc/ops."""
    return CSRC / folder_of(operator) / f"{operator}_cuda.cpp"


def load_operator(name: str, operator: str, launchers: Sequence[str], text: str) -> torch._ops._OpNamespace:
    """``torch.ops.NAME`` with the operators of that text of ``csrc/ops/FAMILY/OPERATOR_cuda.cpp``.

    Args:
        name: a namespace that no other library has.
        operator: also names its glue, ``tests/cuda/emulated/torch/OPERATOR.cpp``.
        launchers: the .cu files below csrc/cuda that it needs besides ``LAUNCHERS``.
        text: of the operator's file, or of a broken copy.
    """
    file = FOLDER / name / folder_of(operator) / source_of(operator).name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    kernels = [_write_launch_header(), *inputs_of(CSRC), *emulation(), *tests_of(TESTS)]
    kernel_mark, mark = (
        hash_of(*kernels),
        hash_of(file, Path(__file__), *kernels),
    )
    folders = [f"-I{FOLDER / 'include'}", f"-I{GLUE}", *includes_of(CSRC)]
    flags = [*FLAGS, "-fPIC", "-Wno-unused-function", *folders]
    kernel_flags = [*flags, "-include", "cuda_runtime_extras.h", "-c"]
    runner = [path for path in emulation() if path.suffix == ".cpp"]
    rewritten = [rewrite_kernel(CSRC / "cuda" / launcher, FOLDER) for launcher in [*LAUNCHERS, *launchers]]
    objects = [
        compile_to(FOLDER / f"{path.stem}.{kernel_mark}.o", [*kernel_flags, path]) for path in [*rewritten, *runner]
    ]
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    glue_flags = [f"-I{FOLDER / name}", *flags, *system, f"-DMOETRAIN_NAMESPACE={name}", "-c"]
    glue = compile_to(FOLDER / f"{name}.{mark}.o", [*glue_flags, GLUE / f"{operator}.cpp"])
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-Wl,-Bsymbolic", "-lc10", "-ltorch_cpu", "-ltorch"]
    library = compile_to(FOLDER / f"{name}.{mark}.so", ["-shared", glue, *objects, *libraries])
    torch.ops.load_library(str(library))
    return getattr(torch.ops, name)


def _write_launch_header() -> Path:
    """A copy of launch_kernel.cuh that launches under emulation."""
    header = FOLDER / "include" / "cuda" / "grouped_gemm" / "launch_kernel.cuh"
    header.parent.mkdir(parents=True, exist_ok=True)
    text = (CSRC / "cuda" / "grouped_gemm" / "launch_kernel.cuh").read_text()
    emulated_launch = r"moetrain::emulation::launch(\1)(kernel, arguments)"
    text, count = re.subn(r"kernel<<<(.*?)>>>\(arguments\)", emulated_launch, text)
    assert count == 1, "launch_kernel.cuh no longer launches kernel<<<...>>>(arguments)"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return header
