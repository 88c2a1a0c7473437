"""rms_norm against its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from moetrain.ops.native import OPS
from moetrain.ops.reference_rms_norm import rms_norm_reference
from moetrain.ops.rms_norm import rms_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (3, 16), (5, 33), (2, 40, 256), (3, 1, 2, 32), (70, 1), (150, 48)]
EPS = 1e-5


def _case(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy at unit scale."""
    random = torch.Generator().manual_seed(seed)
    sizes = (shape, shape[-1:], shape)
    x, weight, dy = (torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in sizes)
    return x, weight, dy


def _run(norm: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor, eps: float = EPS) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = norm(*leaves, eps)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _check(got: list[Tensor], x: Tensor, weight: Tensor, dy: Tensor, eps: float = EPS) -> None:
    """At most twice the largest error of plain torch in the same dtype, plus two roundings of the largest term."""
    if x.numel() == 0:
        return
    exact = _run(rms_norm_reference, x.double(), weight.double(), dy.double(), eps)
    plain = _run(rms_norm_reference, x, weight, dy, eps)
    # The gradient of x is a difference, and of narrow rows little is left of it.
    inv_rms = (x.double().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    terms = [exact[0], dy.double() * weight.double() * inv_rms, exact[2]]
    for ours, theirs, want, term in zip(got, plain, exact, terms, strict=True):
        assert ours.dtype == theirs.dtype
        rounding = torch.finfo(ours.dtype).eps * term.abs().max()
        assert (ours.double() - want).abs().max() <= 2 * (theirs.double() - want).abs().max() + 2 * rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = _case(shape, dtype)
    _check(_run(rms_norm, *case), *case)


def test_a_wrong_epsilon_or_a_missing_term_is_noticed() -> None:
    x, weight, dy = _case((5, 33), torch.float32)
    with pytest.raises(AssertionError):
        _check(_run(rms_norm, x, weight, dy, eps=1e-3), x, weight, dy)
    y, dx, dweight = _run(rms_norm, x, weight, dy)
    inv_rms = (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    with pytest.raises(AssertionError):
        _check([y, dy * weight * inv_rms, dweight], x, weight, dy)
    with pytest.raises(AssertionError):
        _check([y, dx, dweight - dy[-1] * (x * inv_rms)[-1]], x, weight, dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_another_type_are_read_as_they_are(dtype: torch.dtype) -> None:
    x, _, dy = _case((6, 40), dtype)
    for weight_dtype in DTYPES:
        weight = _case((6, 40), weight_dtype, seed=1)[1]
        case = (x, weight, dy)
        got = _run(rms_norm, *case)
        assert [t.dtype for t in got] == [dtype, dtype, weight_dtype]
        _check(got, *case)


def test_half_precision_squares_do_not_overflow() -> None:
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    y = rms_norm(x, torch.ones(64), EPS)
    assert torch.equal(y, torch.ones_like(x))


def test_a_row_of_zeros_is_zero_and_nan_stays_in_its_row() -> None:
    x, weight, dy = _case((4, 40), torch.bfloat16)
    x[1] = 0
    clean = _run(rms_norm, x, weight, dy)
    assert not clean[0][1].any()
    assert torch.equal(clean[1][1], (dy[1].float() * weight.float() * EPS**-0.5).bfloat16())
    poisoned = x.clone()
    poisoned[2, 5] = float("nan")
    got = _run(rms_norm, poisoned, weight, dy)
    others = [0, 1, 3]
    for ours, want in zip(got[:2], clean[:2], strict=True):
        assert ours[2].isnan().all()
        assert torch.equal(ours[others], want[others])
    assert got[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, weight, dy = _case((7, 300, 32), dtype)  # several chunks of rows, the last one short
    want = _run(rms_norm, x, weight, dy)
    strided = [torch.cat((t, t), dim=-1)[..., ::2] for t in (x, dy)]
    for t, like in zip(strided, (x, dy), strict=True):
        t.copy_(like)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy)]
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for x_like, dy_like in ((x, dy), strided, turned):
                got = _run(rms_norm, x_like, weight.expand(2, -1)[1], dy_like)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_an_expanded_gradient_is_one_gradient_per_row() -> None:
    x, weight, dy = _case((6, 24), torch.float32)
    want = _run(rms_norm, x, weight, dy[:1].repeat(6, 1))
    got = _run(rms_norm, x, weight, dy[:1].expand(6, -1))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients_of_weights_stay_exact_over_many_rows() -> None:
    x, weight, _ = _case((50_000, 3), torch.float32)
    case = (x, weight, torch.ones_like(x))
    _check(_run(rms_norm, *case), *case)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 4)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    y, dx, dweight = _run(rms_norm, *_case(shape, torch.bfloat16))
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1], dtype=torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(1, 140),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_any_shape(leading: list[int], width: int, dtype: torch.dtype, seed: int) -> None:
    case = _case((*leading, width), dtype, seed=seed)
    _check(_run(rms_norm, *case), *case)


def test_gradcheck_and_opcheck() -> None:
    x, weight, dy = _case((3, 2, 19), torch.float64)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert gradcheck(lambda x, weight: rms_norm(x, weight, EPS), leaves)
    torch.library.opcheck(OPS.rms_norm, (*leaves, EPS))
    for case in (_case((4, 8), torch.bfloat16), _case((0, 8), torch.float32)):
        torch.library.opcheck(OPS.rms_norm, (case[0], case[1].float().requires_grad_(), EPS))
    _, inv_rms = OPS.rms_norm(x.detach(), weight.detach(), EPS)
    torch.library.opcheck(OPS.rms_norm_backward, (dy, x.detach(), weight.detach(), inv_rms))


def test_compiles_whole_and_recomputes() -> None:
    case = _case((2, 9, 16), torch.float32)
    want = _run(rms_norm, *case)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for norm in (compiled, lambda *args: checkpoint(rms_norm, *args, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(_run(norm, *case), want, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x, w: (x.long(), w), TypeError, "x must be float32, bfloat16, float16 or float64, got Long"),
        (lambda x, w: (x, w.int()), TypeError, "weight must be float32, bfloat16, float16 or float64, got Int"),
        (lambda x, w: (x[0, 0], w), ValueError, r"x must be \[..., D\], got a scalar"),
        (lambda x, w: (x[:, :0], w[:0]), ValueError, r"at least one element, got x of \[3, 0\]"),
        (lambda x, w: (x, w[1:]), ValueError, r"weight must be \[D\] = \[8\], got \[7\]"),
    ],
)
def test_errors(change: Callable[..., tuple[Any, ...]], error: type[Exception], text: str) -> None:
    x, weight, _ = _case((3, 8), torch.float32)
    changed_x, changed_weight = change(x, weight)
    with pytest.raises(error, match=text):
        rms_norm(changed_x, changed_weight, EPS)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda dy, s: (dy[:2], s), ValueError, r"dy must be of x's sizes = \[3, 8\], got \[2, 8\]"),
        (lambda dy, s: (dy.double(), s), TypeError, "dy must have the dtype of x"),
        (lambda dy, s: (dy, s[:, None]), ValueError, r"inv_rms must be x's sizes but the last = \[3\], got \[3, 1\]"),
        (lambda dy, s: (dy, s.double()), TypeError, "inv_rms must be Float, got Double"),
    ],
)
def test_errors_backward(change: Callable[..., tuple[Any, ...]], error: type[Exception], text: str) -> None:
    x, weight, dy = _case((3, 8), torch.float32)
    dy, inv_rms = change(dy, OPS.rms_norm(x, weight, EPS)[1])
    with pytest.raises(error, match=text):
        OPS.rms_norm_backward(dy, x, weight, inv_rms)
