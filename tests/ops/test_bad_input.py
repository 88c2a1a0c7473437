"""What every operator with a CUDA side refuses before it launches anything, with MOETRAIN_DEBUG=1 on both devices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.expert_cases import make_case, output_gradient
from torch import Tensor

from moetrain.ops import (
    add_sources,
    expert_mlp,
    gather_rows,
    group_pairs,
    grouped_gemm,
    grouped_gemm_varlen_k,
    pack_chunks,
    route,
    scatter_add_rows,
    select_experts,
    unpack_chunks,
)
from moetrain.ops.cuda_path import CUDA_PATHS

Call = Callable[[str], Any]


@pytest.fixture(autouse=True)
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")


def int32(*values: int, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def table(*values: int, device: str) -> Tensor:
    return torch.tensor([values], device=device)


def select(device: str, operator: Callable[..., Any], **changes: Any) -> Any:
    options: dict[str, Any] = {"top_k": 2, "score": "softmax", "segment_T": None, "num_segments": 2}
    return operator(torch.randn(3, 4, device=device), **(options | changes))


BAD_LISTS: dict[str, tuple[Call, str]] = {
    "gather_rows, row": (
        lambda device: gather_rows(torch.randn(3, 4, device=device), int32(0, 3, device=device)),
        r"gather_rows: row\[1\] is 3, but the number of rows of x is 3",
    ),
    "gather_rows, offset": (
        lambda device: gather_rows(
            torch.randn(3, 4, device=device), int32(0, 1, device=device), int32(0, 2, 1, device=device)
        ),
        r"gather_rows: offset must not fall, got offset\[1\] = 2 and offset\[2\] = 1",
    ),
    "scatter_add_rows, row": (
        lambda device: scatter_add_rows(torch.randn(2, 4, device=device), int32(0, -1, device=device), num_rows=3),
        r"scatter_add_rows: row\[1\] is -1, but num_rows is 3",
    ),
    "group_pairs": (
        lambda device: group_pairs(int32(0, 1, 5, device=device), 4),
        "group_pairs: expert ids must be -1 or in .*, got 5 at position 2",
    ),
    "select_experts, segment": (
        lambda device: select(device, select_experts, segment_T=int32(0, 2, 1, device=device)),
        r"select_experts: segments must be in \[0, 2\), got 2 at token 1",
    ),
    "route, segment": (
        lambda device: select(device, route, segment_T=int32(0, 2, 1, device=device)),
        r"segments must be in \[0, 2\), got 2 at token 1",
    ),
    "grouped_gemm, row": (
        lambda device: grouped_gemm(
            torch.randn(4, 8, device=device).bfloat16(),
            torch.randn(2, 16, 8, device=device).bfloat16(),
            int32(0, 1, 3, device=device),
            row_M=int32(0, 4, 1, device=device),
        ),
        r"grouped_gemm: row\[1\] is 4, but the number of rows of a is 4",
    ),
    "grouped_gemm, slot": (
        lambda device: grouped_gemm(
            torch.randn(4, 3, device=device),
            torch.randn(2, 5, 3, device=device),
            int32(0, 1, 3, device=device),
            slot_E=int32(0, 2, device=device),
        ),
        r"grouped_gemm: slot\[1\] is 2, but the number of slots is 2",
    ),
    "grouped_gemm_varlen_k, offset": (
        lambda device: grouped_gemm_varlen_k(
            torch.randn(4, 8, device=device).bfloat16(),
            torch.randn(4, 16, device=device).bfloat16(),
            int32(0, 3, 2, device=device),
            num_slots=2,
        ),
        r"grouped_gemm_varlen_k: offset must not fall, got offset\[1\] = 3 and offset\[2\] = 2",
    ),
    "grouped_gemm_varlen_k, row_b": (
        lambda device: grouped_gemm_varlen_k(
            torch.randn(4, 3, device=device),
            torch.randn(2, 5, device=device),
            int32(0, 3, 4, device=device),
            row_b_M=int32(0, 1, 2, 0, device=device),
            num_slots=2,
            out=torch.zeros(2, 3, 5, device=device),
        ),
        r"grouped_gemm_varlen_k: row_b\[2\] is 2, but the number of rows of b is 2",
    ),
    "pack_chunks": (
        lambda device: pack_chunks(torch.zeros(9, device=device), table(4, 0, 6, device=device), 9, torch.float32),
        "pack_chunks: chunk 0 ",
    ),
    "unpack_chunks": (
        lambda device: unpack_chunks(
            torch.zeros(9, device=device), torch.zeros(9, device=device), table(0, 4, 6, device=device)
        ),
        "unpack_chunks_: chunk 0 ",
    ),
    "add_sources": (
        lambda device: add_sources(
            torch.zeros(9, device=device), [torch.zeros(9, device=device)], table(1, 0, 0, 6, device=device)
        ),
        r"add_sources_: chunk 0 must come from a source in \[0, 1\), got 1",
    ),
}


@pytest.mark.parametrize(("call", "text"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_a_bad_list_is_refused(device: str, call: Call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(device)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("row_N", [0, 1, 5, 0, 0, 0, 0], r"expert_mlp: row\[2\] is 5, but the number of rows of x is 5"),
        ("offset_E1", [0, 3, 2], r"expert_mlp: offset must not fall, got offset\[1\] = 3 and offset\[2\] = 2"),
        ("offset_E1", [0, 1, 9], r"expert_mlp: offset\[-1\] is 9, beyond the list's capacity of 7"),
        ("slot_E", [0, 4], r"expert_mlp: slot\[1\] is 4, but the number of slots is 4"),
    ],
)
@pytest.mark.parametrize("path", CUDA_PATHS)
@pytest.mark.filterwarnings("default:expert_mlp runs from separate products")
def test_a_bad_list_of_expert_mlp_is_refused(
    device: str, path: str, name: str, values: list[int], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    major = torch.cuda.get_device_capability()[0] if device == "cuda" else 9
    if (path in {"sm90", "grouped_mm"} and major != 9) or (path == "sm80" and major < 8):
        pytest.skip(f"this GPU has compute capability {major}.x")
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", path)
    case = make_case([1, 3], torch.bfloat16, rows=5, width=8, hidden=8, device=device)
    aligned = {name: getattr(case, name).clone() for name in ("w_in", "w_out")}
    case = case.but(**aligned, **{name: int32(*values, device=device)})
    with pytest.raises(ValueError, match=text):
        expert_mlp(*case.args(), **case.kwargs())
    *tensors, activation = case.positional()
    with pytest.raises(ValueError, match=text):
        torch.ops.moetrain.expert_mlp_backward(output_gradient(case), *tensors, None, activation)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("path", "width", "dtype", "text"),
    [
        ("sm80", 12, torch.bfloat16, "is sm80, which for expert_mlp needs D and F to be multiples of 8, got 12 and 24"),
        ("sm80", 16, torch.float32, "is sm80, which for expert_mlp needs bfloat16, got float32"),
        ("grouped_mm", 16, torch.float32, "is grouped_mm, which for expert_mlp needs "),
    ],
)
def test_what_a_forced_path_cannot_take_is_refused(
    path: str, width: int, dtype: torch.dtype, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", path)
    case = make_case([1, 3], dtype, width=width, device="cuda")
    with pytest.raises(ValueError, match=text):
        expert_mlp(*case.args(), **case.kwargs())


@pytest.mark.gpu
@pytest.mark.parametrize("forced", ["sm90", "sm80"])
def test_a_forced_product_that_cannot_run_is_refused(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", forced)
    offset_E1 = int32(0, 1, 4, device="cuda")
    a, b = torch.randn(4, 8, device="cuda"), torch.randn(2, 16, 8, device="cuda")
    with pytest.raises(ValueError, match=f"MOETRAIN_CUDA_PATH is {forced}, which for grouped_gemm needs BFloat16"):
        grouped_gemm(a, b, offset_E1)
    with pytest.raises(ValueError, match=f"MOETRAIN_CUDA_PATH is {forced}, which for grouped_gemm_varlen_k needs BF"):
        grouped_gemm_varlen_k(a, a, offset_E1, num_slots=2)
