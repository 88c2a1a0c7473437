"""rotate against its definition."""

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
from moetrain.ops.reference_rotate import rotate_reference
from moetrain.ops.rotate import rotate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 2), (2, 7, 3, 4), (1, 40, 8, 32), (2, 5, 2, 80), (1, 3, 1, 66)]


def _case(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, ...]:
    """x, cosines, sines and dy."""
    random = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(2))
    angle = 100 * torch.rand(*shape[:2], shape[3] // 2, generator=random, dtype=torch.float64)
    tables = torch.promote_types(dtype, torch.float32)
    return x, angle.cos().to(tables), angle.sin().to(tables), dy


def _run(turn: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = turn(leaf, cos, sin)
    return [y.detach(), *torch.autograd.grad(y, [leaf], dy)]


def _check(got: list[Tensor], x: Tensor, cos: Tensor, sin: Tensor, dy: Tensor) -> None:
    """At most twice the largest error of plain torch in the same dtype, plus a rounding of the largest value."""
    exact = _run(rotate_reference, x.double(), cos.double(), sin.double(), dy.double())
    plain = _run(rotate_reference, x, cos, sin, dy)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        if want.numel() > 0:
            rounding = torch.finfo(ours.dtype).eps * want.abs().max()
            assert (ours.double() - want).abs().max() <= 2 * (theirs.double() - want).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = _case(shape, dtype)
    _check(_run(rotate, *case), *case)


def test_the_wrong_way_and_the_neighbours_angles_are_noticed() -> None:
    x, cos, sin, dy = _case((2, 7, 3, 4), torch.bfloat16)
    y, dx = _run(rotate, x, cos, sin, dy)
    for wrong in ([*_run(rotate, x, cos, -sin, dy)], [*_run(rotate, x, cos.roll(1, 1), sin.roll(1, 1), dy)]):
        with pytest.raises(AssertionError):
            _check([wrong[0], dx], x, cos, sin, dy)
        with pytest.raises(AssertionError):
            _check([y, wrong[1]], x, cos, sin, dy)


def test_a_quarter_turn_is_exact_and_backwards_undoes_it() -> None:
    x = _case((1, 3, 2, 8), torch.bfloat16)[0]
    cos, sin = torch.zeros(1, 3, 4), torch.ones(1, 3, 4)
    y = rotate(x, cos, sin)
    assert torch.equal(y, torch.cat((-x[..., 4:], x[..., :4]), dim=-1))
    assert torch.equal(OPS.rotate(y, cos, sin, True), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, cos, sin, dy = _case((3, 230, 4, 16), dtype)
    want = _run(rotate, x, cos, sin, dy)
    wide = [torch.cat((t, t), dim=-1)[..., :16] for t in (x, dy)]
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy)]
    elements_first = [x, dy.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)]
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for x_like, dy_like in ((x, dy), wide, heads_first, elements_first):
                got = _run(rotate, x_like, cos, sin, dy_like)
                assert got[0].is_contiguous()
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_nothing_to_turn(shape: tuple[int, ...]) -> None:
    y, dx = _run(rotate, *_case(shape, torch.bfloat16))
    assert y.shape == dx.shape == shape


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_any_shape(rows: int, length: int, heads: int, half: int, dtype: torch.dtype, seed: int) -> None:
    case = _case((rows, length, heads, 2 * half), dtype, seed=seed)
    _check(_run(rotate, *case), *case)


def test_gradcheck_and_opcheck() -> None:
    x, cos, sin, _ = _case((1, 3, 2, 6), torch.float64)
    assert gradcheck(lambda x: rotate(x, cos, sin), x.requires_grad_())
    torch.library.opcheck(OPS.rotate, (x, cos, sin, False))
    half = _case((2, 3, 2, 4), torch.bfloat16)
    torch.library.opcheck(OPS.rotate, (half[0].requires_grad_(), *half[1:3], True))


def test_compiles_whole_and_recomputes() -> None:
    case = _case((2, 9, 2, 8), torch.float32)
    want = _run(rotate, *case)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for turn in (compiled, lambda *args: checkpoint(rotate, *args, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(_run(turn, *case), want, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x, c, s: (x[0], c, s), ValueError, r"x must be \[B, S, H, d\] with an even d, got \[5, 3, 8\]"),
        (lambda x, c, s: (x[..., :7], c, s), ValueError, "with an even d"),
        (lambda x, c, s: (x.long(), c, s), TypeError, "x must be float32, bfloat16, float16 or float64, got Long"),
        (lambda x, c, s: (x.transpose(2, 3)[..., :2], c, s), ValueError, "the last dimension of x must have stride 1"),
        (lambda x, c, s: (x, c[:1], s), ValueError, r"cos must be \[B, S, d / 2\] = \[2, 5, 4\], got \[1, 5, 4\]"),
        (lambda x, c, s: (x, c, s.double()), TypeError, "sin must be Float, got Double"),
        (lambda x, c, s: (x, c, s.transpose(0, 1).contiguous().transpose(0, 1)), ValueError, "sin must be contiguous"),
    ],
)
def test_errors(change: Callable[..., tuple[Any, ...]], error: type[Exception], text: str) -> None:
    x, cos, sin, _ = _case((2, 5, 3, 8), torch.float32)
    with pytest.raises(error, match=text):
        rotate(*change(x, cos, sin))
