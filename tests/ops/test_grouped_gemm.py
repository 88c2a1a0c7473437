"""grouped_gemm (varlen-M) against a loop over groups. Shapes: M rows, S slots, N and K a slot's sides, T rows of a."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops.grouped_gemm import grouped_gemm
from moetrain.ops.reference_grouped_gemm import grouped_gemm_reference

pytestmark = pytest.mark.filterwarnings("default:.*runs its simple kernels")  # on CUDA

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
T, K, N = 16, 24, 20  # N = 20 keeps bf16 off tensor cores, N = 24 does not
SIZES = {
    "uneven": [7, 0, 13, 10, 3],
    "one row": [0, 1, 0, 0, 0],
    "all to one": [0, 0, 0, 41, 0],
    "long group": [0, 1100, 0, 0, 5],
    "no rows": [0, 0, 0, 0, 0],
    "no groups": [],
}
TAIL = 4


def int32(values: list[int] | Tensor, device: str = "cpu") -> Tensor:
    return torch.as_tensor(values, device=device).to(torch.int32)


def offsets(sizes: list[int], device: str = "cpu") -> Tensor:
    return int32(torch.tensor([0, *sizes]).cumsum(0), device)


def strided_slots(slots: int, rows: int, cols: int, dtype: torch.dtype, device: str) -> Tensor:
    """[slots, rows, cols] with gaps between slots, as views into a store's flat chunks have, and between rows."""
    return torch.randn(slots, rows + 3, cols + 8, dtype=dtype, device=device)[:, :rows, :cols]


def case(
    sizes: list[int], dtype: torch.dtype, device: str, *, kn: bool, gathered: bool, cols: int = N
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    num = sum(sizes) + TAIL
    b = strided_slots(7, K if kn else cols, cols if kn else K, dtype, device)
    a = torch.randn(T if gathered else num, K, dtype=dtype, device=device)
    row = int32(torch.randint(T, (num,)), device) if gathered else None
    slot = int32(torch.randperm(7)[: len(sizes)], device)
    return (a, b, offsets(sizes, device)), {"slot_E": slot, "row_M": row, "b_is_kn": kn}


def exact(args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Tensor:
    return grouped_gemm_reference(args[0].double(), args[1].double(), args[2], **kwargs)


def error_of(c: Tensor, exact_c: Tensor) -> float:
    return (c.double() - exact_c).abs().max().item() if c.numel() else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("kn", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("cols", [N, N + 4])
def test_as_accurate_as_torch(
    device: str, dtype: torch.dtype, sizes: list[int], kn: bool, gathered: bool, cols: int
) -> None:
    args, kwargs = case(sizes, dtype, device, kn=kn, gathered=gathered, cols=cols)
    length = sum(sizes)
    exact_c = exact(args, kwargs)[:length]
    c = grouped_gemm(*args, **kwargs)
    assert (c.dtype, c.shape) == (dtype, (length + TAIL, cols))
    torch_error = error_of(grouped_gemm_reference(*args, **kwargs)[:length], exact_c)
    bound = 2 * torch_error + (1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps)
    assert error_of(c[:length], exact_c) <= bound
    if length:  # the bound notices a wrong slot, and a group that is one row short
        wrong_slot = grouped_gemm(*args, **(kwargs | {"slot_E": (kwargs["slot_E"] + 1) % 7}))
        assert error_of(wrong_slot[:length], exact_c) > bound


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_integers_are_exact(data: st.DataObject) -> None:
    rows_k, rows_n, num_slots = (data.draw(st.integers(lo, 20)) for lo in (0, 0, 1))
    sizes = data.draw(st.lists(st.integers(0, 9), max_size=6))
    num = sum(sizes) + data.draw(st.integers(0, 3))
    num_rows = data.draw(st.integers(1, 9))
    kn, gathered = data.draw(st.booleans()), data.draw(st.booleans())
    a = torch.randint(-5, 6, (num_rows if gathered else num, rows_k)).float()
    b = torch.randint(-5, 6, (num_slots, rows_k, rows_n) if kn else (num_slots, rows_n, rows_k)).float()
    kwargs: dict[str, Any] = {
        "slot_E": int32(torch.randint(num_slots, (len(sizes),))),
        "row_M": int32(torch.randint(num_rows, (num,))) if gathered else None,
        "b_is_kn": kn,
    }
    c = grouped_gemm(a, b, offsets(sizes), **kwargs)
    length = sum(sizes)
    assert torch.equal(c[:length], grouped_gemm_reference(a, b, offsets(sizes), **kwargs)[:length])


def test_without_slots_group_e_uses_slot_e(device: str) -> None:
    (a, b, offset), _ = case(SIZES["uneven"], torch.float64, device, kn=False, gathered=False)
    c = grouped_gemm(a, b[:5], offset)
    torch.testing.assert_close(c[:33], grouped_gemm_reference(a, b[:5], offset)[:33], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    args, kwargs = case([600, 0, 700, 3, 90], dtype, "cpu", kn=False, gathered=True)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(grouped_gemm(*args, **kwargs)[:1393])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bits_of_one_deep_product_for_any_number_of_threads() -> None:
    a, b = torch.randn(20, 5000, dtype=torch.float64), torch.randn(1, 16, 5000, dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            results.append(grouped_gemm(a, b, offsets([20])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kn", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 0, 0], [1, 0, 0]])
def test_gradient(device: str, kn: bool, gathered: bool, sizes: list[int]) -> None:
    num = sum(sizes) + 2
    a = torch.randn(4 if gathered else num, 3, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(4, *((3, 2) if kn else (2, 3)), dtype=torch.float64, device=device, requires_grad=True)
    row = int32([0, 3, 3, 1, 0, 2, 1][:num], device) if gathered else None
    slot, offset = int32([3, 0, 0], device), offsets(sizes, device)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return grouped_gemm(a, b, offset, slot_E=slot, row_M=row, b_is_kn=kn)[: sum(sizes)]

    torch.autograd.gradcheck(product, (a, b))
    da, db = torch.autograd.grad(product(a, b).sum(), (a, b))
    expected = grouped_gemm_reference(a, b, offset, slot_E=slot, row_M=row, b_is_kn=kn)[: sum(sizes)]
    expected_da, expected_db = torch.autograd.grad(expected.sum(), (a, b))
    torch.testing.assert_close(da, expected_da, rtol=0, atol=1e-13)
    torch.testing.assert_close(db, expected_db, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gathered", [False, True])
def test_tail_is_ignored_forward_and_backward(device: str, gathered: bool) -> None:
    args, kwargs = case([2, 0, 3], torch.float64, device, kn=False, gathered=gathered)
    a, b, offset = args
    if gathered:
        kwargs["row_M"][5:] = -7
    else:
        a[5:] = float("nan")
    a.requires_grad_()
    b = b.clone().requires_grad_()
    c = grouped_gemm(a, b, offset, **kwargs)
    dc = torch.randn_like(c)
    dc[5:] = float("nan")
    c.backward(dc)
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    assert gathered or torch.equal(a.grad[5:], torch.zeros_like(a.grad[5:]))
    assert a.grad.count_nonzero() > 0


def test_only_needed_gradients_are_computed(device: str) -> None:
    (a, b, offset), kwargs = case([2, 0, 3], torch.float64, device, kn=False, gathered=True)
    a.requires_grad_()
    c = grouped_gemm(a, b, offset, **kwargs)
    assert c.grad_fn is not None
    assert c.grad_fn.next_functions[1][0] is None
    assert torch.autograd.grad(c[:5].sum(), a)[0].shape == a.shape


def test_registration(device: str) -> None:
    (a, b, _), kwargs = case(SIZES["uneven"], torch.float32, device, kn=False, gathered=True)
    full = int32([0, 5, 5, 10, 20, kwargs["row_M"].shape[0]], device)  # a tail would hold whatever memory held
    op_args = (a.requires_grad_(), b.requires_grad_(), full, kwargs["slot_E"], kwargs["row_M"], False)
    torch.library.opcheck(torch.ops.moetrain.grouped_gemm.default, op_args)


def test_compiles_in_one_graph(device: str) -> None:
    (a, b, offset), kwargs = case(SIZES["uneven"], torch.float64, device, kn=False, gathered=True)
    b = b.clone().requires_grad_()

    def half(b: Tensor) -> Tensor:
        return 0.5 * grouped_gemm(a, b, offset, **kwargs)[:33]

    compiled = torch.compile(half, backend="aot_eager", fullgraph=True)
    (expected_db,) = torch.autograd.grad(half(b).square().sum(), b)
    (db,) = torch.autograd.grad(compiled(b).square().sum(), b)
    assert torch.equal(db, expected_db)


A, B, OFFSET = torch.randn(4, 3), torch.randn(2, 5, 3), [0, 1, 4]


@pytest.mark.parametrize(
    ("a", "b", "offset", "kwargs", "error", "text"),
    [
        (A[0], B, OFFSET, {}, ValueError, r"grouped_gemm: a must be \[M, K\], got \[3\]"),
        (A, B[0], OFFSET, {}, ValueError, r"b must be \[slots, N, K\], got \[5, 3\]"),
        (A, B[0], OFFSET, {"b_is_kn": True}, ValueError, r"b must be \[slots, K, N\], got \[5, 3\]"),
        (A.int(), B, OFFSET, {}, TypeError, "a must be float32.*got Int"),
        (A, B.double(), OFFSET, {}, TypeError, r"b must have the dtype of a \(Float\), got Double"),
        (A, B.mT, OFFSET, {}, ValueError, "the last dimension of b must have stride 1.*call .contiguous"),
        (A, torch.randn(3).expand(2, 5, 3), OFFSET, {}, ValueError, "rows of b must not overlap"),
        (A, B, OFFSET, {"b_is_kn": True}, ValueError, r"b must be \[slots, K, N\] with K = 3 as in a, got \[2, 5, 3\]"),
        (A, B, [0, 1, 2, 4], {}, ValueError, r"without slot there must be one slot per group \(3\), got 2 slots"),
        (A, B, OFFSET, {"slot_E": [0]}, ValueError, r"slot must have one entry per group \(2\), got 1"),
        (A, B, OFFSET, {"slot_E": [0, 2]}, ValueError, r"slot\[1\] is 2, but the number of slots is 2"),
        (A, B, OFFSET, {"row_M": [0, 1, 9, 0]}, ValueError, r"row\[2\] is 9, but the number of rows of a is 4"),
        (A, B, [0, 1, 5], {}, ValueError, r"offset\[-1\] is 5, beyond the list's capacity of 4"),
    ],
)
def test_errors_name_the_argument_and_what_came(
    a: Tensor, b: Tensor, offset: list[int], kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    kwargs = {name: int32(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    with pytest.raises(error, match=text):
        grouped_gemm(a, b, int32(offset), **kwargs)


def test_offset_of_another_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="grouped_gemm: offset must be Int, got Long"):
        grouped_gemm(A, B, torch.tensor(OFFSET))
