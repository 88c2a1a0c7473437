"""The CUDA side of grouped_gemm and grouped_gemm_varlen_k, launchers and kernels, run on the host.

Every case runs by the kernels of each architecture and by the simple ones, and is compared with float64.
"""

import itertools
from typing import Any

import pytest
import torch
from emulated_operators import ARCHITECTURES, load_operator, source_of
from torch import Tensor

from moetrain.ops.reference_grouped_gemm import grouped_gemm_reference
from moetrain.ops.reference_grouped_gemm_varlen_k import grouped_gemm_varlen_k_reference

pytestmark = pytest.mark.slow  # two minutes of compilation

PATHS = [*ARCHITECTURES, "simple"]
SIMPLE = {
    "grouped_gemm": ["grouped_gemm/simple/grouped_gemm.cu", "routing/group_pairs.cu"],
    "grouped_gemm_varlen_k": ["grouped_gemm/simple/grouped_gemm_varlen_k.cu", "routing/group_pairs.cu"],
}
SIZES = [0, 70, 1, 0, 130, 9]
LENGTH, BEYOND, ROWS, SLOTS = sum(SIZES), 20, 61, 5
Namespace = torch._ops._OpNamespace


def load(operator: str, name: str = "", old: str = "", new: str = "") -> Namespace:
    """The operators as they stand, or with an edit."""
    text = source_of(operator).read_text()
    assert old in text, f"the text to replace is not in {operator}_cuda.cpp: {old}"
    return load_operator(f"{operator}_{name or 'emulated'}", operator, SIMPLE[operator], text.replace(old, new))


@pytest.fixture(scope="module")
def by_rows() -> Namespace:
    return load("grouped_gemm")


@pytest.fixture(scope="module")
def over_rows() -> Namespace:
    return load("grouped_gemm_varlen_k")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", request.param)
    return request.param


def int32(values: list[int] | Tensor) -> Tensor:
    return torch.as_tensor(values).to(torch.int32)


OFFSET = int32([0, *itertools.accumulate(SIZES)])
SLOT = int32([3, 0, 4, 2, 0, 3])  # slot 1 is nobody's
RANDOM = torch.Generator().manual_seed(3)


def bf16(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=RANDOM).bfloat16()


def rows() -> Tensor:
    row_M = torch.randint(ROWS, (LENGTH + BEYOND,), generator=RANDOM)
    row_M[LENGTH:] = 1 << 30
    return int32(row_M)


def require_close(actual: Tensor, expected: Tensor) -> None:
    """Every element within the rounding of the result, at the scale of the largest."""
    assert actual.shape == expected.shape
    error, scale = (actual.double() - expected).abs().max(), expected.abs().max()
    assert error <= 0.004 * scale, f"error {error:.3g} at scale {scale:.3g}"


def product_case(*, kn: bool, gathered: bool, aligned: bool = True, width: int = 72) -> tuple[Any, ...]:
    cols = 104
    gap = 8 if aligned else 4
    row_M = rows() if gathered else None
    a_MK = bf16(ROWS if gathered else LENGTH + BEYOND, width + gap)[:, :width]
    b = bf16(2 * SLOTS, *((width, cols + 8) if kn else (cols, width + 8)))[::2, :, : cols if kn else width]
    return a_MK, b, OFFSET, SLOT, row_M, kn


def require_product(operators: Namespace, args: tuple[Any, ...]) -> None:
    a_MK, b, offset_E1, slot_E, row_M, kn = args
    options = {"slot_E": slot_E, "row_M": None if row_M is None else row_M[:LENGTH], "b_is_kn": kn}
    expected = grouped_gemm_reference(a_MK.double(), b.double(), offset_E1, **options)
    require_close(operators.grouped_gemm(*args)[:LENGTH], expected[:LENGTH])


def require_products(operators: Namespace) -> None:
    for kn, gathered in itertools.product((False, True), repeat=2):
        require_product(operators, product_case(kn=kn, gathered=gathered))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kn", [False, True])
def test_products(by_rows: Namespace, kn: bool, gathered: bool, aligned: bool) -> None:
    require_product(by_rows, product_case(kn=kn, gathered=gathered, aligned=aligned))


@pytest.mark.usefixtures("path")
def test_a_long_product(by_rows: Namespace) -> None:
    require_product(by_rows, product_case(kn=False, gathered=False, width=1024))


def sum_case(*, gathered: str, slots: bool = True, aligned: bool = True) -> tuple[Any, ...]:
    gap = 8 if aligned else 4
    lists = [rows() if name in gathered else None for name in "ab"]
    a, b = (
        bf16(LENGTH + BEYOND if row is None else ROWS, width + gap)[:, :width]
        for row, width in zip(lists, (72, 136), strict=True)
    )
    return a, b, OFFSET, SLOT if slots else None, *lists


def exact_sum(args: tuple[Any, ...], num_slots: int) -> Tensor:
    a, b, offset_E1, slot_E, *lists = args
    row_a_M, row_b_M = (None if row is None else row[:LENGTH] for row in lists)
    a, b = (t if row is not None else t[:LENGTH] for t, row in ((a, row_a_M), (b, row_b_M)))
    options = {"slot_E": slot_E, "row_a_M": row_a_M, "row_b_M": row_b_M, "num_slots": num_slots}
    return grouped_gemm_varlen_k_reference(a.double(), b.double(), offset_E1, **options)


def require_sum(operators: Namespace, args: tuple[Any, ...]) -> None:
    num_slots = SLOTS if args[3] is not None else len(SIZES)
    require_close(operators.grouped_gemm_varlen_k(*args, num_slots), exact_sum(args, num_slots))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("gathered", ["", "a", "b", "ab"])
def test_sums(over_rows: Namespace, gathered: str) -> None:
    require_sum(over_rows, sum_case(gathered=gathered))
    require_sum(over_rows, sum_case(gathered=gathered, slots=False, aligned=False))


@pytest.mark.usefixtures("path")
def test_sums_are_added_to_a_wide_out(over_rows: Namespace) -> None:
    args = sum_case(gathered="b")
    out_SIJ = torch.randn(SLOTS, 72, 136, generator=RANDOM)
    expected = out_SIJ.double() + exact_sum(args, SLOTS)
    before = out_SIJ[1].clone()
    over_rows.grouped_gemm_varlen_k_(out_SIJ, *args)
    error = (out_SIJ.double() - expected).abs().max() / expected.abs().max()
    assert error <= 1e-6, f"error {error:.3g}: rounded to bf16?"
    assert torch.equal(out_SIJ[1], before)


PRODUCT_MUTANTS = [
    (".slots = data_or_null<int32_t>(in.slot_E)", ".slots = nullptr"),
    (".a_stride = row_stride(a)", ".a_stride = 0"),
    ("in.b_SNK.size(0) > 1 ? in.b_SNK.stride(0) : 0", "0"),
    (".row_indices = data_or_null<int32_t>(in.row_M)", ".row_indices = nullptr"),
    ("in.b_is_kn ? kernels.grouped_gemm_mn_major : kernels.grouped_gemm", "kernels.grouped_gemm"),
]
SUM_MUTANTS = [
    ("lists(in.slot_E, num_slots, stream)", "lists(std::nullopt, num_slots, stream)"),
    ("varlen_k_operand(b, data_or_null<int32_t>(in.row_b_M))", "varlen_k_operand(b, nullptr)"),
    ("accumulate, num_blocks, stream)", "false, num_blocks, stream)"),
]


@pytest.mark.parametrize("mutant_idx", range(len(PRODUCT_MUTANTS)))
def test_a_broken_product_is_noticed(mutant_idx: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "sm80")
    broken = load("grouped_gemm", f"broken_{mutant_idx}", *PRODUCT_MUTANTS[mutant_idx])
    with pytest.raises((AssertionError, RuntimeError)):
        require_products(broken)


@pytest.mark.parametrize("mutant_idx", range(len(SUM_MUTANTS)))
def test_a_broken_sum_is_noticed(mutant_idx: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "sm80")
    broken = load("grouped_gemm_varlen_k", f"broken_{mutant_idx}", *SUM_MUTANTS[mutant_idx])
    with pytest.raises((AssertionError, RuntimeError)):
        test_sums_are_added_to_a_wide_out(broken)


def test_what_does_not_fit_takes_the_simple_kernels(
    by_rows: Namespace, over_rows: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which say why, where it is bf16 and nobody asked for them."""
    monkeypatch.delenv("MOETRAIN_CUDA_PATH", raising=False)
    a_MK, b, *rest = product_case(kn=False, gathered=True)
    nothing_to_gather = (*rest[:-2], rest[-2][:0], rest[-1])
    for changed, obstacle in (
        ((a_MK, b, *rest), ""),
        ((a_MK.double(), b.double(), *rest), ""),
        ((a_MK[:, :68], b[..., :68], *rest), "K and N to be multiples of 8, got 68 and 104"),
        ((a_MK[:, :68], b[..., :68], *nothing_to_gather), ""),
        ((a_MK, b[:, :100], *rest), "K and N to be multiples of 8, got 72 and 100"),
        ((a_MK, b[:1].expand(b.shape), *rest), "a matrix of its own for each slot of b, got strides [0, 80, 1]"),
    ):
        assert by_rows.grouped_gemm_obstacle(*changed) == obstacle
        if changed[4].numel():
            require_product(by_rows, changed)
    args = sum_case(gathered="a")
    out_SIJ = bf16(SLOTS, 72, 136)
    expected = out_SIJ.double() + exact_sum(args, SLOTS)
    assert over_rows.grouped_gemm_varlen_k_obstacle(*args, SLOTS, None) == ""
    assert over_rows.grouped_gemm_varlen_k_obstacle(*args, SLOTS, out_SIJ) == "Float to add to, got BFloat16"
    over_rows.grouped_gemm_varlen_k_(out_SIJ, *args)
    require_close(out_SIJ, expected)
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "simple")
    assert by_rows.grouped_gemm_obstacle(a_MK[:, :68], b[..., :68], *rest) == ""


@pytest.mark.parametrize("forced", ARCHITECTURES)
def test_what_a_forced_path_cannot_take_is_refused(
    by_rows: Namespace, over_rows: Namespace, forced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", forced)
    a_MK, b, *rest = product_case(kn=False, gathered=False)
    for changed, text in (
        ((a_MK.float(), b.float()), "BFloat16, got Float"),
        ((a_MK[:, :68], b[..., :68]), "K and N to be multiples of 8, got 68 and 104"),
        ((a_MK, bf16(SLOTS, 104, 76)[..., :72]), r"b at multiples of 16 bytes, got strides \[7904, 76, 1\]"),
        ((a_MK, b[:1].expand(b.shape)), r"a matrix of its own for each slot of b, got strides \[0, 80, 1\]"),
    ):
        with pytest.raises(ValueError, match=f"MOETRAIN_CUDA_PATH is {forced}, which for grouped_gemm needs {text}"):
            by_rows.grouped_gemm(*changed, *rest)
    args = sum_case(gathered="")
    gaps = torch.zeros(SLOTS, 80, 136)[:, :72]
    with pytest.raises(ValueError, match=f"is {forced}, which for grouped_gemm_varlen_k needs an out without gaps"):
        over_rows.grouped_gemm_varlen_k_(gaps, *args)


def test_an_unknown_path_is_refused(by_rows: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "fast")
    with pytest.raises(ValueError, match="must be sm90, sm80, grouped_mm, simple or loop, got fast; unset it"):
        by_rows.grouped_gemm(*product_case(kn=False, gathered=False))


@pytest.mark.usefixtures("path")
def test_nothing_to_do(by_rows: Namespace, over_rows: Namespace) -> None:
    a_MK, b, _, _, _, kn = product_case(kn=False, gathered=False)
    none = torch.zeros(len(SIZES) + 1, dtype=torch.int32)
    assert by_rows.grouped_gemm(a_MK[:0], b, none, SLOT, None, kn).shape == (0, 104)
    assert by_rows.grouped_gemm(a_MK, b[:0], none, SLOT, None, kn).shape == (LENGTH + BEYOND, 104)  # no slots
    empty = by_rows.grouped_gemm(a_MK[:, :0], b[..., :0], OFFSET, SLOT, None, kn)
    assert not empty[:LENGTH].any()
    a, b, *_ = sum_case(gathered="")
    for first, second, offset in ((a[:0], b[:0], none), (a, b, none)):
        out_SIJ = over_rows.grouped_gemm_varlen_k(first, second, offset, SLOT, None, None, SLOTS)
        assert out_SIJ.shape == (SLOTS, 72, 136)
        assert not out_SIJ.any()


@pytest.mark.usefixtures("path")
def test_bad_lists_are_refused_before_a_launch(
    by_rows: Namespace, over_rows: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    a_MK, b, _, _, row_M, kn = product_case(kn=False, gathered=True)
    bad_row = row_M.clone()
    bad_row[7] = ROWS
    falls = OFFSET.clone()
    falls[2] = 300
    for offset, slot, row, text in (
        (OFFSET, SLOT, bad_row, r"row\[7\] is 61, but the number of rows of a is 61"),
        (falls, SLOT, row_M, r"offset must not fall, got offset\[2\] = 300"),
        (OFFSET, SLOT + 1, row_M, r"slot\[2\] is 5, but the number of slots is 5"),
    ):
        with pytest.raises(ValueError, match=f"grouped_gemm: {text}"):
            by_rows.grouped_gemm(a_MK, b, offset, slot, row, kn)
    a, b, *_, row_a_M, _ = sum_case(gathered="a")
    for offset, slot, row, text in (
        (OFFSET, SLOT, bad_row, r"row_a\[7\] is 61, but the number of rows of a is 61"),
        (falls, SLOT, row_a_M, r"offset must not fall"),
        (OFFSET, SLOT - 1, row_a_M, r"slot\[1\] is -1"),
    ):
        with pytest.raises(ValueError, match=f"grouped_gemm_varlen_k: {text}"):
            over_rows.grouped_gemm_varlen_k(a, b, offset, slot, row, None, SLOTS)
