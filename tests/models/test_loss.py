from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.models.loss import linear_cross_entropy_sum

T, D, V = 13, 5, 11


def _inputs(num_tokens: int = T, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype)
    w_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    target_T = torch.randint(-1, V, (num_tokens,), generator=generator)
    return x_TD.requires_grad_(), w_VD.requires_grad_(), target_T


def _by_definition(x_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    logits_TV = x_TD @ w_VD.T
    keep_T = target_T >= 0
    return (logits_TV.logsumexp(-1) - logits_TV.gather(1, target_T.clamp(min=0)[:, None])[:, 0])[keep_T].sum()


@pytest.mark.parametrize("chunk", [1, 3, 13, 100, None])
def test_value_and_gradients_are_those_of_the_definition(chunk: int | None) -> None:
    x_TD, w_VD, target_T = _inputs()
    loss = linear_cross_entropy_sum(x_TD, w_VD, target_T, chunk)
    want = _by_definition(x_TD, w_VD, target_T)
    torch_says = functional.cross_entropy(x_TD @ w_VD.T, target_T, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, torch_says, rtol=1e-12, atol=0)
    got_grads = torch.autograd.grad(0.3 * loss, (x_TD, w_VD))
    want_grads = torch.autograd.grad(0.3 * want, (x_TD, w_VD))
    for got, grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-11, atol=1e-13)


def test_one_changed_target_changes_the_loss() -> None:
    x_TD, w_VD, target_T = _inputs()
    target_T[4] = 3
    before = linear_cross_entropy_sum(x_TD, w_VD, target_T, 3).detach()
    target_T[4] = 4
    after = linear_cross_entropy_sum(x_TD, w_VD, target_T, 3).detach()
    assert abs(float(after - before)) > 1e-3


def test_gradcheck() -> None:
    x_TD, w_VD, target_T = _inputs()
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy_sum(x, w, target_T, 4), (x_TD, w_VD), fast_mode=True
    )


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which: int) -> None:
    inputs = _inputs()
    inputs[1 - which].requires_grad_(False)
    got = torch.autograd.grad(linear_cross_entropy_sum(*inputs, 4), inputs[which])[0]
    want = torch.autograd.grad(_by_definition(*inputs), inputs[which])[0]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_loss_tokens_give_zero_and_zero_gradients(num_tokens: int) -> None:
    x_TD, w_VD, _ = _inputs(num_tokens)
    loss = linear_cross_entropy_sum(x_TD, w_VD, torch.full((num_tokens,), -1), 3)
    assert float(loss.detach()) == 0.0
    grad_x_TD, grad_w_VD = torch.autograd.grad(loss, (x_TD, w_VD))
    assert grad_x_TD.shape == x_TD.shape
    assert grad_w_VD.shape == w_VD.shape
    assert not grad_x_TD.any()
    assert not grad_w_VD.any()


def test_narrow_inputs_sum_in_float32() -> None:
    x_TD, w_VD, target_T = _inputs(4096, torch.bfloat16)
    loss = linear_cross_entropy_sum(x_TD, w_VD, target_T, 64)
    exact = _by_definition(x_TD.double(), w_VD.double(), target_T)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-3)
    grads = torch.autograd.grad(loss, (x_TD, w_VD))
    want = torch.autograd.grad(exact, (x_TD, w_VD))
    for got, grad in zip(grads, want, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.double() - grad.double()).abs().max()) < 0.01 * float(grad.abs().max())


class _Seen(TorchDispatchMode):
    """Remembers the most elements that any operator's result had, and how many matrices were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.num_products += func.overloadpacket is torch.ops.aten.mm
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@pytest.mark.parametrize(("chunk", "bounded"), [(4, True), (64, False)])
def test_logits_of_a_large_vocabulary_never_exist(chunk: int, bounded: bool) -> None:
    num_tokens, vocab = 64, 150_000
    x_TD = torch.randn(num_tokens, 2, requires_grad=True)
    w_VD = torch.randn(vocab, 2, requires_grad=True)
    with _Seen() as seen:
        linear_cross_entropy_sum(x_TD, w_VD, torch.arange(num_tokens), chunk).backward()
    assert (seen.num_elements <= 4 * vocab) is bounded


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_made_only_where_they_are_wanted(training: bool) -> None:
    x_TD, w_VD = torch.randn(4, 2, requires_grad=True), torch.randn(9, 2, requires_grad=True)
    with _Seen() as seen, torch.set_grad_enabled(training):
        linear_cross_entropy_sum(x_TD, w_VD, torch.arange(4), 1)
    assert seen.num_products == 4 * (3 if training else 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x_TD": torch.zeros(2, 3, D)}, r"must be \[T, D\] and \[V, D\], got \[2, 3, 5\]"),
        ({"w_VD": torch.zeros(V, D + 1)}, r"got \[13, 5\] and \[11, 6\]"),
        ({"w_VD": torch.zeros(V, D)}, "must have one type, got torch.float64 and torch.float32"),
        ({"target_T": torch.zeros(T)}, r"target_T must be int64 \[13\], got torch.float32"),
        ({"target_T": torch.zeros(T + 1, dtype=torch.int64)}, r"target_T must be int64 \[13\], got torch.int64 \[14\]"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], text: str) -> None:
    x_TD, w_VD, target_T = _inputs()
    given: dict[str, Any] = {"x_TD": x_TD, "w_VD": w_VD, "target_T": target_T} | change
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy_sum(**given)
