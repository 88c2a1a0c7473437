"""A real CUDA build of the extension: its operators, symbols and machine code. No GPU is needed to look at them.

Skipped where the extension has no CUDA; ``launch/test.sh --cuda-build`` makes such a build and runs this.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from cuda_tools import HOPPER, KERNELS, ROOT, find_tool

import moetrain.ops  # noqa: F401  all operators, those registered in Python too
from moetrain import _C
from moetrain.ops import native

pytestmark = pytest.mark.skipif(not native.HAS_CUDA, reason="the extension is built without CUDA")

# Operators that CUDA tensors never reach, and why.
WITHOUT_CUDA_KERNEL = {
    **dict.fromkeys(("causal_attention", "causal_attention_backward"), "models/attention.py takes torch's attention"),
    **dict.fromkeys(("rms_norm", "rms_norm_backward", "rotate"), "ops/rms_norm.py and ops/rotate.py compose torch's"),
    **dict.fromkeys(("plan_sends", "plan_receives"), "ops/plan_rows.py composes them of other operators"),
}
CUDA_ONLY = {
    *("expert_mlp_kernels", "expert_mlp_kernels_backward"),  # one path of expert_mlp among several
    *("grouped_gemm_obstacle", "grouped_gemm_varlen_k_obstacle"),  # to tensor cores
}
SECTION = re.compile(r"^Fatbin (elf|ptx) code:\n=+\narch = (\S+)\n(?:.+\n)*?identifier = (\S+)", re.MULTILINE)
LOAD_WITH_ALL_SYMBOLS = "import ctypes, os, sys, torch; ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def extension() -> str:
    return str(_C.__file__)


def without_kernel(operators: set[str], device: str) -> set[str]:
    keys = (device, "CompositeExplicitAutograd")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name for name in operators if not any(has_kernel(f"moetrain::{name}", key) for key in keys)}


def test_every_operator_has_a_kernel_for_cuda_or_a_reason_not_to() -> None:
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    operators = {operator for library, _, operator in names if library == "moetrain"}
    assert len(operators) > 20
    assert without_kernel(operators, "CPU") == CUDA_ONLY
    assert without_kernel(operators, "CUDA") == set(WITHOUT_CUDA_KERNEL)


def test_all_symbols_are_there_without_a_driver() -> None:
    run(sys.executable, "-c", LOAD_WITH_ALL_SYMBOLS, extension())
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", extension()))
    assert any(name.startswith("libcudart.so") for name in needed)
    assert not any(name.startswith("libcuda.so") for name in needed), "the driver must be looked up when it is used"


def test_machine_code_is_there_for_the_architectures_that_a_file_names() -> None:
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip("TORCH_CUDA_ARCH_LIST asks for architectures of its own")
    found = defaultdict(set)
    for kind, architecture, source in SECTION.findall(run(find_tool("cuobjdump"), "-symbols", extension())):
        found[source].add((kind, architecture))
    everywhere = {("elf", "sm_80"), ("elf", "sm_90a"), ("ptx", "sm_80")}
    hopper = {("elf", "sm_90a")}
    assert found == {str(path.relative_to(ROOT)): hopper if path in HOPPER else everywhere for path in KERNELS}
