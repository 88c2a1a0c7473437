"""scatter_add_rows against plain torch. Shapes: T rows of the result, D width, N entries of the list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops.reference_scatter_add_rows import scatter_add_rows_reference
from moetrain.ops.scatter_add_rows import scatter_add_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
T, D, N = 16, 8, 37


def int32(values: list[int] | Tensor, device: str = "cpu") -> Tensor:
    return torch.as_tensor(values, device=device).to(torch.int32)


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def case(device: str, dtype: torch.dtype, num: int = N, num_rows: int = T, width: int = D) -> tuple[Tensor, ...]:
    row_N = torch.randint(num_rows, (num,)) if num_rows else torch.zeros(0)
    y_ND = torch.randn(num, width, device=device, dtype=dtype)
    return y_ND, int32(row_N, device), torch.rand(num, device=device, dtype=weight_dtype(dtype)) + 0.5


def error_of(x_TD: Tensor, exact_TD: Tensor) -> float:
    return (x_TD.double() - exact_TD).abs().max().item() if x_TD.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [0, 1, 37, 500])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_accurate_as_torch(device: str, dtype: torch.dtype, num: int, weighted: bool) -> None:
    y_ND, row_N, weight_N = case(device, dtype, num)
    weight = weight_N if weighted else None
    exact_TD = scatter_add_rows_reference(y_ND.double(), row_N, None if weight is None else weight.double(), num_rows=T)
    torch_error = error_of(scatter_add_rows_reference(y_ND, row_N, weight, num_rows=T), exact_TD)
    x_TD = scatter_add_rows(y_ND, row_N, weight, num_rows=T)
    assert x_TD.dtype == dtype
    bound = 2 * torch_error + (4e-14 if dtype == torch.float64 else torch.finfo(dtype).eps)
    assert error_of(x_TD, exact_TD) <= bound
    if num > 1:  # the bound notices a lost row, and a lost weight
        lost_TD = scatter_add_rows(y_ND, row_N, weight, int32([0, num - 1], device), num_rows=T)
        assert error_of(lost_TD, exact_TD) > bound
        assert not weighted or error_of(scatter_add_rows(y_ND, row_N, num_rows=T), exact_TD) > bound


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_integers_are_exact(data: st.DataObject) -> None:
    num_rows, width, pad = (data.draw(st.integers(0, hi)) for hi in (9, 40, 3))
    row = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=50)) if num_rows else []
    length = data.draw(st.integers(0, len(row)))
    dtype = data.draw(st.sampled_from(DTYPES[2:]))
    y_ND = torch.randint(-9, 9, (len(row), width + pad)).to(dtype)[:, :width]
    weight_N = torch.randint(-3, 4, (len(row),)).to(dtype) if data.draw(st.booleans()) else None
    row_N, offset_E1 = int32(row), int32([0, length // 2, length])
    x_TD = scatter_add_rows(y_ND, row_N, weight_N, offset_E1, num_rows=num_rows)
    assert torch.equal(x_TD, scatter_add_rows_reference(y_ND, row_N, weight_N, offset_E1, num_rows=num_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_and_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    y_ND, row_N, weight_N = case("cpu", dtype, num=4000, num_rows=97, width=300)
    in_order_TD = torch.zeros(97, 300, dtype=weight_dtype(dtype))
    for n, t in enumerate(row_N.tolist()):
        in_order_TD[t] += y_ND[n].to(weight_dtype(dtype))
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            results.append(scatter_add_rows(y_ND, row_N, weight_N, num_rows=97))
            assert torch.equal(scatter_add_rows(y_ND, row_N, num_rows=97), in_order_TD.to(dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)
    if dtype == torch.float32:  # the order shows in the bits, so a changed order would be noticed
        backwards_TD = scatter_add_rows(y_ND.flip(0), row_N.flip(0), weight_N.flip(0), num_rows=97)
        assert not torch.equal(results[0], backwards_TD)


def test_all_pairs_on_one_row(device: str) -> None:
    y_ND, _, weight_N = case(device, torch.float64)
    x_TD = scatter_add_rows(y_ND, int32([3] * N, device), weight_N, num_rows=T)
    torch.testing.assert_close(x_TD[3], weight_N @ y_ND, rtol=0, atol=1e-13)
    assert x_TD.abs().sum(dim=1).count_nonzero() == 1


def test_tail_is_ignored_forward_and_backward(device: str) -> None:
    y_ND, _, weight_N = (x.requires_grad_(x.is_floating_point()) for x in case(device, torch.float64, num=5))
    with torch.no_grad():
        y_ND[3:], weight_N[3:] = float("nan"), float("inf")
    row_N = int32([3, 3, 0, 99, -5], device)
    x_TD = scatter_add_rows(y_ND, row_N, weight_N, int32([0, 2, 3], device), num_rows=T)
    assert torch.equal(x_TD[0], weight_N[2] * y_ND[2])
    dx_TD = torch.randn_like(x_TD)
    x_TD.backward(dx_TD)
    dx_ND = dx_TD[[3, 3, 0]]
    assert y_ND.grad is not None
    assert weight_N.grad is not None
    torch.testing.assert_close(y_ND.grad[:3], weight_N.detach()[:3, None] * dx_ND, rtol=0, atol=0)
    torch.testing.assert_close(weight_N.grad[:3], (y_ND.detach()[:3] * dx_ND).sum(1), rtol=0, atol=1e-14)
    assert torch.equal(y_ND.grad[3:], torch.zeros_like(y_ND.grad[3:]))
    assert torch.equal(weight_N.grad[3:], torch.zeros_like(weight_N.grad[3:]))


@pytest.mark.parametrize("num", [0, 1, 11])
@pytest.mark.parametrize("with_offset", [False, True])
def test_gradient(device: str, num: int, with_offset: bool) -> None:
    y_ND, row_N, weight_N = case(device, torch.float64, num, width=3)
    offset_E1 = int32([0, num // 2, num - num // 4], device) if with_offset else None
    y_ND.requires_grad_()
    weight_N.requires_grad_()

    def weighted(y_ND: Tensor, weight_N: Tensor) -> Tensor:
        return scatter_add_rows(y_ND, row_N, weight_N, offset_E1, num_rows=T)

    torch.autograd.gradcheck(weighted, (y_ND, weight_N))
    torch.autograd.gradcheck(lambda y_ND: scatter_add_rows(y_ND, row_N, None, offset_E1, num_rows=T), (y_ND,))
    (dweight_N,) = torch.autograd.grad(weighted(y_ND.detach(), weight_N).sum(), weight_N)
    assert dweight_N.shape == weight_N.shape


def test_half_precision_gradients_keep_their_dtypes(device: str) -> None:
    y_ND, row_N, weight_N = case(device, torch.bfloat16)
    y_ND.requires_grad_()
    weight_N.requires_grad_()
    dx_TD = torch.randn(T, D, device=device, dtype=torch.bfloat16)
    scatter_add_rows(y_ND, row_N, weight_N, num_rows=T).backward(dx_TD)
    exact_dweight_N = (y_ND.detach().double() * dx_TD.double()[row_N.long()]).sum(1)
    assert y_ND.grad is not None
    assert weight_N.grad is not None
    assert (y_ND.grad.dtype, weight_N.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(weight_N.grad.double(), exact_dweight_N, rtol=0, atol=1e-5)
    expected_dy_ND = (weight_N.detach()[:, None] * dx_TD[row_N.long()]).to(torch.bfloat16)
    assert torch.equal(y_ND.grad, expected_dy_ND)


def test_registration(device: str) -> None:
    y_ND, row_N, weight_N = case(device, torch.float32)
    y_ND.requires_grad_()
    weight_N.requires_grad_()
    offset_E1 = int32([0, 5, N], device)
    torch.library.opcheck(torch.ops.moetrain.scatter_add_rows.default, (y_ND, row_N, weight_N, offset_E1, T))
    torch.library.opcheck(torch.ops.moetrain.scatter_add_rows.default, (y_ND, row_N, None, None, T))


def test_compiles_in_one_graph(device: str) -> None:
    y_ND, row_N, weight_N = case(device, torch.float64)
    y_ND.requires_grad_()

    def twice(y_ND: Tensor) -> Tensor:
        return 2 * scatter_add_rows(y_ND, row_N, weight_N, int32([0, 5, 30], device), num_rows=T)

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    (expected_dy,) = torch.autograd.grad(twice(y_ND).square().sum(), y_ND)
    (dy_ND,) = torch.autograd.grad(compiled(y_ND).square().sum(), y_ND)
    assert torch.equal(dy_ND, expected_dy)


Y = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("y", "row", "weight", "num_rows", "error", "text"),
    [
        (torch.randn(3), [0], None, 1, ValueError, r"scatter_add_rows: y must be \[N, D\], got \[3\]"),
        (torch.randn(4, 2).T, [0, 0], None, 1, ValueError, "the last dimension of y must have stride 1"),
        (Y.int(), [0, 0], None, 1, TypeError, "y must be float32"),
        (Y, [0], None, 1, ValueError, r"row must have one entry per row of y \(2\), got 1"),
        (Y, torch.zeros(2, dtype=torch.int64), None, 1, TypeError, "row must be Int, got Long"),
        (Y, [0, 0], torch.ones(3), 1, ValueError, r"weight must have one entry per row of y \(2\), got \[3\]"),
        (Y, [0, 0], torch.ones(2).double(), 1, TypeError, "weight must be Float where y is Float, got Double"),
        (Y.bfloat16(), [0, 0], torch.ones(2).bfloat16(), 1, TypeError, "weight must be Float where y is BFloat16"),
        (Y, [0, 0], torch.ones(4)[::2], 1, ValueError, "weight must be contiguous"),
        (Y, [0, 0], None, -1, ValueError, "num_rows must be at least 0, got -1"),
        (Y, [0, 7], None, 7, ValueError, r"row\[1\] is 7, but num_rows is 7"),
    ],
)
def test_errors_name_the_argument_and_what_came(
    y: Tensor, row: list[int] | Tensor, weight: Tensor | None, num_rows: int, error: type[Exception], text: str
) -> None:
    row_N = row if isinstance(row, Tensor) else int32(row)
    with pytest.raises(error, match=text):
        scatter_add_rows(y, row_N, weight, num_rows=num_rows)
