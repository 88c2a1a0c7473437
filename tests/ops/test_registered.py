"""What torch.compile and CUDA graphs need of every operator of the extension: a fake implementation, a CUDA side."""

import pytest
import torch
from torch._library.simple_registry import singleton

import moetrain.ops
from moetrain import _C

# On the CPU alone: other devices compose them of torch's operators, or refuse them by name.
CPU_ONLY = {
    "plan_sends",
    "plan_receives",
    "offer_pairs",
    "round_pairs",
    "causal_attention",
    "causal_attention_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
}


def names() -> list[str]:
    assert moetrain.ops
    found = (name.partition("::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("moetrain::"))
    return sorted(name for _, _, name in found)


def has_fake(name: str) -> bool:
    entry = singleton.find(f"moetrain::{name}")
    return entry.fake_impl.kernel is not None or torch._C._dispatch_has_kernel_for_dispatch_key(
        f"moetrain::{name}", "Meta"
    )


def test_the_operators_are_listed() -> None:
    assert {"expert_mlp", "expert_mlp_kernels", "grouped_gemm", "gather_rows", "route", *CPU_ONLY} <= set(names())


@pytest.mark.parametrize("name", names())
def test_each_has_a_fake(name: str) -> None:
    assert has_fake(name), f"register_fake('moetrain::{name}') is missing: torch.compile cannot trace it"


def test_a_missing_fake_is_noticed() -> None:
    with torch.library._scoped_library("moetrain", "FRAGMENT") as library:
        library.define("without_fake(Tensor x) -> Tensor")
        assert not has_fake("without_fake")


@pytest.mark.skipif(not _C.has_cuda, reason="the extension is built without CUDA")
@pytest.mark.parametrize("name", [name for name in names() if name not in CPU_ONLY])
def test_each_has_a_cuda_side(name: str) -> None:
    keys = ("CUDA", "CompositeExplicitAutograd")
    assert any(torch._C._dispatch_has_kernel_for_dispatch_key(f"moetrain::{name}", key) for key in keys)
