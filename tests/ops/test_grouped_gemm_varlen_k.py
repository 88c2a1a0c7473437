"""grouped_gemm_varlen_k against a loop over slots. Shapes: M rows, S slots, I and J a slot's sides, T rows."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops.grouped_gemm_varlen_k import grouped_gemm_varlen_k
from moetrain.ops.reference_grouped_gemm_varlen_k import grouped_gemm_varlen_k_reference

pytestmark = pytest.mark.filterwarnings("default:.*runs its simple kernels")  # on CUDA

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
T, I, J, S = 16, 12, 20, 7
SIDES = [(I, J), (16, 24)]  # on CUDA bf16 runs on tensor cores where both are multiples of 8
SIZES = {
    "uneven": [7, 0, 13, 10, 3],
    "one row": [0, 1, 0, 0, 0],
    "all to one": [0, 0, 0, 700, 0],
    "no rows": [0, 0, 0, 0, 0],
    "no groups": [],
}
TAIL = 4


def int32(values: list[int] | Tensor, device: str = "cpu") -> Tensor:
    return torch.as_tensor(values, device=device).to(torch.int32)


def offsets(sizes: list[int], device: str = "cpu") -> Tensor:
    return int32(torch.tensor([0, *sizes]).cumsum(0), device)


def case(
    sizes: list[int], dtype: torch.dtype, device: str, gathered: str, sides: tuple[int, int] = SIDES[0]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    num = sum(sizes) + TAIL
    rows_i, rows_j = sides
    a = torch.randn(T if "a" in gathered else num, rows_i + 3, dtype=dtype, device=device)[:, :rows_i]
    b = torch.randn(T if "b" in gathered else num, rows_j, dtype=dtype, device=device)
    rows = {
        f"row_{name}_M": int32(torch.randint(T, (num,)), device) if name in gathered else None for name in ("a", "b")
    }
    slot = int32([5, 1, 5, 2, 0][: len(sizes)], device)  # two groups share slot 5; slots 3, 4 and 6 have none
    return (a, b, offsets(sizes, device)), {"slot_E": slot, "num_slots": S, **rows}


def exact(args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
    return grouped_gemm_varlen_k_reference(args[0].double(), args[1].double(), args[2], **kwargs)


def error_of(out: Tensor, exact_out: Tensor) -> float:
    return (out.double() - exact_out).abs().max().item() if out.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("gathered", ["", "a", "b", "ab"])
@pytest.mark.parametrize("sides", SIDES)
def test_as_accurate_as_torch(
    device: str, dtype: torch.dtype, sizes: list[int], gathered: str, sides: tuple[int, int]
) -> None:
    args, kwargs = case(sizes, dtype, device, gathered, sides)
    exact_out = exact(args, kwargs)
    out = grouped_gemm_varlen_k(*args, **kwargs)
    assert (out.dtype, out.shape) == (dtype, (S, *sides))
    torch_error = error_of(grouped_gemm_varlen_k_reference(*args, **kwargs), exact_out)
    bound = 2 * torch_error + (1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps)
    assert error_of(out, exact_out) <= bound
    assert torch.equal(out[[3, 4, 6]], torch.zeros_like(out[[3, 4, 6]]))
    if sum(sizes) > 1:  # the bound notices a lost row
        short = int32(args[2].clamp(max=sum(sizes) - 1), device)
        assert error_of(grouped_gemm_varlen_k(args[0], args[1], short, **kwargs), exact_out) > bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("sides", SIDES)
def test_adds_to_out_in_place(device: str, dtype: torch.dtype, wide: bool, gap: int, sides: tuple[int, int]) -> None:
    args, kwargs = case(SIZES["uneven"], dtype, device, "b", sides)
    out_dtype = torch.promote_types(dtype, torch.float32) if wide else dtype
    store = torch.ones(S, sides[0] + gap, sides[1], dtype=out_dtype, device=device)
    out = grouped_gemm_varlen_k(*args, **kwargs, out=store[:, : sides[0]])
    assert out.data_ptr() == store.data_ptr()
    exact_out = exact(args, kwargs) + 1
    by_torch = grouped_gemm_varlen_k_reference(args[0].to(out_dtype), args[1].to(out_dtype), args[2], **kwargs)
    eps = 1e-14 if dtype == torch.float64 else torch.finfo(out_dtype).eps
    assert error_of(out, exact_out) <= 2 * error_of(by_torch, exact_out - 1) + eps * exact_out.abs().max().item()
    assert torch.equal(store[:, sides[0] :], torch.ones_like(store[:, sides[0] :]))
    assert torch.equal(out[[3, 4, 6]], torch.ones_like(out[[3, 4, 6]]))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_integers_are_exact(data: st.DataObject) -> None:
    sides = [data.draw(st.integers(0, 12)) for _ in range(2)]
    num_slots, num_rows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=6))
    num = sum(sizes) + data.draw(st.integers(0, 3))
    gathered = [data.draw(st.booleans()) for _ in range(2)]
    a, b = (
        torch.randint(-5, 6, (num_rows if g else num, side)).float() for g, side in zip(gathered, sides, strict=True)
    )
    row_a, row_b = (int32(torch.randint(num_rows, (num,))) if g else None for g in gathered)
    slot = int32(torch.randint(num_slots, (len(sizes),)))
    kwargs: dict[str, Any] = {"slot_E": slot, "row_a_M": row_a, "row_b_M": row_b, "num_slots": num_slots}
    expected = grouped_gemm_varlen_k_reference(a, b, offsets(sizes), **kwargs)
    assert torch.equal(grouped_gemm_varlen_k(a, b, offsets(sizes), **kwargs), expected)
    out = torch.full_like(expected, 3.0)
    assert torch.equal(grouped_gemm_varlen_k(a, b, offsets(sizes), **kwargs, out=out), expected + 3)


def test_without_slots_group_e_adds_to_slot_e(device: str) -> None:
    args, _ = case(SIZES["uneven"], torch.float64, device, "")
    out = grouped_gemm_varlen_k(*args, num_slots=5)
    expected = grouped_gemm_varlen_k_reference(*args, num_slots=5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    args, kwargs = case([90, 0, 200, 31, 60], dtype, "cpu", "ab")
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(grouped_gemm_varlen_k(*args, **kwargs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("wide", [False, True])
def test_bits_of_one_large_slot_for_any_number_of_threads(wide: bool) -> None:
    num_rows, width = (5000, 16) if wide else (3000, 200)
    a, b = (torch.randn(num_rows, side, dtype=torch.float64) for side in (width, 16))
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            results.append(grouped_gemm_varlen_k(a, b, offsets([num_rows]), num_slots=1))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0][0], a.T @ b, rtol=0, atol=1e-11)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("gathered", ["", "a", "b", "ab"])
@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 0, 0], [1, 0, 0]])
def test_gradient(device: str, gathered: str, sizes: list[int]) -> None:
    num = sum(sizes) + 2
    a, b = (
        torch.randn(4 if name in gathered else num, width, dtype=torch.float64, device=device, requires_grad=True)
        for name, width in (("a", 3), ("b", 2))
    )
    row_a, row_b = (int32([0, 3, 3, 1, 0, 2, 1][:num], device) if name in gathered else None for name in ("a", "b"))
    kwargs: dict[str, Any] = {"slot_E": int32([3, 0, 3], device), "row_a_M": row_a, "row_b_M": row_b, "num_slots": 4}
    offset = offsets(sizes, device)
    torch.autograd.gradcheck(lambda a, b: grouped_gemm_varlen_k(a, b, offset, **kwargs), (a, b))
    grads = torch.autograd.grad(grouped_gemm_varlen_k(a, b, offset, **kwargs).sum(), (a, b))
    expected = torch.autograd.grad(grouped_gemm_varlen_k_reference(a, b, offset, **kwargs).sum(), (a, b))
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-13)


def test_tail_is_ignored(device: str) -> None:
    (a, b, offset), kwargs = case([2, 0, 3], torch.float64, device, "a")
    kwargs["row_a_M"][5:] = 99
    b[5:] = float("nan")
    a.requires_grad_()
    b.requires_grad_()
    out = grouped_gemm_varlen_k(a, b, offset, **kwargs)
    assert out.isfinite().all()
    out.backward(torch.randn_like(out))
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.isfinite().all()
    assert torch.equal(b.grad[5:], torch.zeros_like(b.grad[5:]))
    assert b.grad[:5].count_nonzero() > 0


def test_registration(device: str) -> None:
    args, kwargs = case(SIZES["uneven"], torch.float32, device, "b")
    tail = (kwargs["slot_E"], kwargs["row_a_M"], kwargs["row_b_M"])
    torch.library.opcheck(
        torch.ops.moetrain.grouped_gemm_varlen_k.default,
        (args[0].detach().requires_grad_(), args[1].requires_grad_(), args[2], *tail, S),
    )
    out, a, b = torch.ones(S, I, J, device=device), args[0].detach(), args[1].detach()
    torch.library.opcheck(torch.ops.moetrain.grouped_gemm_varlen_k_.default, (out, a, b, args[2], *tail))


A, B, OFFSET = torch.randn(4, 3), torch.randn(4, 5), [0, 1, 4]


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "error", "text"),
    [
        (A[0], B, {}, ValueError, r"grouped_gemm_varlen_k: a must be \[M, I\], got \[3\]"),
        (A, B[0], {}, ValueError, r"b must be \[M, J\], got \[5\]"),
        (A.int(), B, {}, TypeError, "a must be float32.*got Int"),
        (A, B.double(), {}, TypeError, r"b must have the dtype of a \(Float\), got Double; convert one"),
        (A, B[:3], {}, ValueError, "a and b must pair up row by row, got 4 rows in a and 3 rows in b"),
        (A, B, {"row_b_M": [0, 1]}, ValueError, "got 4 rows in a and 2 entries in row_b"),
        (
            A,
            B,
            {"row_b_M": [0, 1, 2, 4]},
            ValueError,
            r"row_b\[3\] is 4, but the number of rows of b is 4; ids must be at least 0",
        ),
        (A, B, {"row_a_M": [0, 1, -1, 0]}, ValueError, r"row_a\[2\] is -1, but the number of rows of a is 4"),
        (A, B, {"num_slots": -1}, ValueError, "num_slots must be at least 0, got -1"),
        (
            A,
            B,
            {"num_slots": 3},
            ValueError,
            r"without slot there must be one slot per group \(2\), got 3 slots; pass slot",
        ),
        (A, B, {"slot_E": [0, 2]}, ValueError, r"slot\[1\] is 2, but the number of slots is 2"),
        (A, B, {"out": torch.zeros(3, 3, 5)}, ValueError, r"out must have num_slots \(2\) slots, got \(3, 3, 5\)"),
        (A, B, {"out": torch.zeros(())}, ValueError, r"out must be \[slots, I, J\], got \[\]"),
        (A[0], B, {"out": torch.zeros(2, 3, 5)}, ValueError, r"a must be \[M, I\], got \[3\]"),
        (A, B[0], {"out": torch.zeros(2, 3, 5)}, ValueError, r"b must be \[M, J\], got \[5\]"),
        (A, B, {"out": torch.zeros(2, 5, 3)}, ValueError, r"out must be \[slots, 3, 5\], got \[2, 5, 3\]"),
        (
            A,
            B,
            {"out": torch.zeros(2, 3, 5).half()},
            TypeError,
            r"out must have the dtype of a \(Float\) or Float, got Half; add into one of those",
        ),
        (
            A,
            B,
            {"out": torch.zeros(3, 5).expand(2, 3, 5)},
            ValueError,
            "slots of out must not overlap.*; pass memory of its own",
        ),
        (A.clone().requires_grad_(), B, {"out": torch.zeros(2, 3, 5)}, ValueError, "call it under torch.no_grad"),
    ],
)
def test_errors_name_the_argument_and_what_came(
    a: Tensor, b: Tensor, kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    kwargs = {name: int32(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    with pytest.raises(error, match=text):
        grouped_gemm_varlen_k(a, b, int32(OFFSET), **({"num_slots": 2} | kwargs))
