"""What torch.compile needs of every operator: a fake implementation."""

import pytest
import torch
from torch._library.simple_registry import singleton

import moetrain.ops

MISTAKES = ("canary_double", "canary_read")  # tests/sanitizer/canary.cpp, in a sanitized build


def names() -> list[str]:
    assert moetrain.ops
    found = (name.partition("::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("moetrain::"))
    return sorted(name for _, _, name in found if name not in MISTAKES)


def has_fake(name: str) -> bool:
    entry = singleton.find(f"moetrain::{name}")
    return entry.fake_impl.kernel is not None or torch._C._dispatch_has_kernel_for_dispatch_key(
        f"moetrain::{name}", "Meta"
    )


def test_the_operators_are_listed() -> None:
    assert {"expert_mlp", "expert_mlp_kernels", "grouped_gemm", "gather_rows", "route", "round_pairs"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_each_has_a_fake(name: str) -> None:
    assert has_fake(name), f"register_fake('moetrain::{name}') is missing: torch.compile cannot trace it"


def test_a_missing_fake_is_noticed() -> None:
    with torch.library._scoped_library("moetrain", "FRAGMENT") as library:
        library.define("without_fake(Tensor x) -> Tensor")
        assert not has_fake("without_fake")
