"""What has no second derivative says so, and never leaves it out in silence."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moetrain.ops import causal_attention, expert_mlp, rms_norm, rotate, route, select_experts
from moetrain.ops.reference_rms_norm import rms_norm_reference


def leaf(*sizes: int) -> Tensor:
    random = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, generator=random, dtype=torch.float64).requires_grad_()


def of_attention() -> tuple[Tensor, Tensor]:
    q_THd, first_T = leaf(5, 2, 8), torch.zeros(5, dtype=torch.int32)
    return q_THd, causal_attention(q_THd, leaf(5, 1, 8), leaf(5, 1, 8), first_T, torch.tensor([0, 5]).int())


def of_experts() -> tuple[Tensor, Tensor]:
    x_RD = leaf(3, 4)
    row_N, offset_E1 = torch.tensor([0, 1, 2, 0], dtype=torch.int32), torch.tensor([0, 3, 4], dtype=torch.int32)
    return x_RD, expert_mlp(x_RD, row_N, leaf(4), offset_E1, leaf(2, 2, 6, 4), leaf(2, 4, 6))


def of_norm() -> tuple[Tensor, Tensor]:
    x = leaf(3, 4)
    return x, rms_norm(x, leaf(4), 1e-6)


def of_route() -> tuple[Tensor, Tensor]:
    logits_TE = leaf(3, 4)
    return logits_TE, route(logits_TE, 2).weight_N


def of_selection() -> tuple[Tensor, Tensor]:
    logits_TE = leaf(3, 4)
    return logits_TE, select_experts(logits_TE, 2).weight_TK


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("causal_attention", of_attention),
        ("expert_mlp", of_experts),
        ("rms_norm", of_norm),
        ("route", of_route),
        ("select_experts", of_selection),
    ],
)
def test_the_second_backward_pass_is_refused(op: str, case: Callable[[], tuple[Tensor, Tensor]]) -> None:
    x, y = case()
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert bool(dx.any())
    with pytest.raises(NotImplementedError, match=f"{op}: gradients of its gradients are not built"):
        dx.square().sum().backward()


def test_rotations_have_all_derivatives() -> None:
    angle_BSd = leaf(1, 3, 2).detach()
    x_BSHd = leaf(1, 3, 1, 4)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, angle_BSd.cos(), angle_BSd.sin()).square(), (x_BSHd,))


def test_the_reference_that_is_named_has_them() -> None:
    assert torch.autograd.gradgradcheck(
        lambda x: rms_norm_reference(x, torch.ones(4, dtype=x.dtype), 1e-6), (leaf(3, 4),)
    )
