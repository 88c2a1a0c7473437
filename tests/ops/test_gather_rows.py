"""gather_rows against plain torch. Shapes: T rows, D width, N entries of the list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops.gather_rows import gather_rows
from moetrain.ops.reference_gather_rows import gather_rows_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
T, D = 16, 8


def int32(values: list[int] | Tensor, device: str = "cpu") -> Tensor:
    return torch.as_tensor(values, device=device).to(torch.int32)


def random_rows(num: int, device: str = "cpu") -> Tensor:
    return int32(torch.randint(T, (num,)), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [0, 1, 37])
@pytest.mark.parametrize("D", [1, 7, 64])
def test_equals_indexing(device: str, dtype: torch.dtype, N: int, D: int) -> None:
    x_TD = torch.randn(T, D, device=device, dtype=dtype)
    row_N = random_rows(N, device)
    y_ND = gather_rows(x_TD, row_N)
    assert y_ND.dtype == dtype
    assert y_ND.shape == (N, D)
    assert torch.equal(y_ND, gather_rows_reference(x_TD, row_N))
    if N:
        assert not torch.equal(y_ND, gather_rows_reference(x_TD, (row_N + 1) % T))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_list_any_stride(data: st.DataObject) -> None:
    num_rows, width, pad = (data.draw(st.integers(0, hi)) for hi in (9, 40, 3))
    row = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=50)) if num_rows else []
    length = data.draw(st.integers(0, len(row)))
    x_TD = torch.randn(num_rows, width + pad)[:, :width]
    row_N, offset_E1 = int32(row), int32([0, length // 2, length])
    y_ND = gather_rows(x_TD, row_N, offset_E1)
    assert torch.equal(y_ND[:length], gather_rows_reference(x_TD, row_N, offset_E1)[:length])


def test_threads_do_not_matter() -> None:
    x_TD, row_N = torch.randn(T, 4096), random_rows(999)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(gather_rows(x_TD, row_N))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, x_TD[row_N.long()]) for result in results)


def test_tail_is_ignored_forward_and_backward(device: str) -> None:
    x_TD = torch.randn(T, D, device=device, dtype=torch.float64, requires_grad=True)
    row_N = int32([3, 3, 0, 99, -5], device)  # what lies beyond the true length need not even be a row
    y_ND = gather_rows(x_TD, row_N, int32([0, 2, 3], device))
    assert torch.equal(y_ND[:3], x_TD[[3, 3, 0]])
    y_ND.backward(torch.full_like(y_ND, 1.0).index_fill(0, torch.tensor([3, 4], device=device), float("nan")))
    expected_T = torch.zeros(T, dtype=torch.float64, device=device)
    expected_T[3], expected_T[0] = 2, 1
    assert x_TD.grad is not None
    assert torch.equal(x_TD.grad, expected_T[:, None].expand(T, D))


@pytest.mark.parametrize("N", [0, 1, 37])
def test_gradient(device: str, N: int) -> None:
    x_TD = torch.randn(T, D, device=device, dtype=torch.float64, requires_grad=True)
    row_N = random_rows(N, device)
    torch.autograd.gradcheck(lambda x_TD: gather_rows(x_TD, row_N), (x_TD,))
    (dx_TD,) = torch.autograd.grad(gather_rows(x_TD, row_N).sum(), x_TD)  # an expanded gradient: all strides 0
    count_T = torch.bincount(row_N, minlength=T).to(torch.float64)
    assert torch.equal(dx_TD, count_T[:, None].expand(T, D))


def test_registration(device: str) -> None:
    x_TD = torch.randn(T, D, device=device, requires_grad=True)
    row_N = random_rows(37, device)
    torch.library.opcheck(torch.ops.moetrain.gather_rows.default, (x_TD, row_N, None))
    torch.library.opcheck(torch.ops.moetrain.gather_rows.default, (x_TD, row_N, int32([0, 5, 37], device)))


@pytest.mark.parametrize(
    ("x", "row", "offset", "error", "text"),
    [
        (torch.randn(3), [0], None, ValueError, r"gather_rows: x must be \[T, D\], got \[3\]"),
        (torch.randn(3, 4).T, [0], None, ValueError, r"the last dimension of x must have stride 1.*call .contiguous"),
        (torch.randn(4).expand(3, 4), [0], None, ValueError, r"rows of x must not overlap.*call .contiguous"),
        (torch.ones(3, 4, dtype=torch.int64), [0], None, TypeError, r"x must be float32.*float64, got"),
        (torch.randn(3, 4), torch.zeros(1, 1, dtype=torch.int32), None, ValueError, r"row must be \[N\], got \[1, 1\]"),
        (torch.randn(3, 4), torch.zeros(1), None, TypeError, "row must be Int, got Float"),
        (torch.randn(3, 4), int32([0, 0, 1])[::2], None, ValueError, "row must be contiguous"),
        (torch.randn(3, 4), [0, 3], None, ValueError, r"row\[1\] is 3, but the number of rows of x is 3"),
        (torch.randn(3, 4), [0, -1], None, ValueError, r"row\[1\] is -1, but the number of rows of x is 3"),
        (torch.randn(3, 4), [0, 1], [], ValueError, r"offset must have E \+ 1 >= 1 entries"),
        (torch.randn(3, 4), [0, 1], [0, 3], ValueError, r"offset\[-1\] is 3, beyond the list's capacity of 2"),
        (torch.randn(3, 4), [0, 1], [1, 2], ValueError, r"offset must start at 0, got offset\[0\] = 1"),
        (torch.randn(3, 4), [0, 1], [0, 2, 1], ValueError, r"offset must not fall, got offset\[1\] = 2 and"),
    ],
)
def test_errors_name_the_argument_and_what_came(
    x: Tensor, row: list[int] | Tensor, offset: list[int] | None, error: type[Exception], text: str
) -> None:
    row_N = row if isinstance(row, Tensor) else int32(row)
    with pytest.raises(error, match=text):
        gather_rows(x, row_N, None if offset is None else int32(offset))


@pytest.mark.gpu
def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="gather_rows: row is on cpu but x is on cuda:0; move one"):
        gather_rows(torch.randn(3, 4, device="cuda"), torch.zeros(1, dtype=torch.int32))


@pytest.mark.gpu
def test_debugging_checks_row_numbers_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"gather_rows: row\[1\] is 3, but the number of rows of x is 3"):
        gather_rows(torch.randn(3, 4, device="cuda"), int32([0, 3], "cuda"))
