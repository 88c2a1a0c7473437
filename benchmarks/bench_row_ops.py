"""Row ops and grouped GEMMs against plain torch. Run: python benchmarks/bench_row_ops.py

One MoE layer of 4096 tokens, width 512, 64 experts of hidden width 128, top-8 (design figures for this shape exist), in
fp32 and bf16. Values are checked before anything is timed. "one matmul" does a product's arithmetic in one dense call:
its ratio is the fraction of what torch's GEMM reaches on this machine, in this run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timing import Row, arguments, compare, report
from torch import Tensor

from moetrain.ops import gather_rows, group_pairs, grouped_gemm, grouped_gemm_varlen_k, scatter_add_rows
from moetrain.ops.reference_gather_rows import gather_rows_reference
from moetrain.ops.reference_grouped_gemm import grouped_gemm_reference
from moetrain.ops.reference_grouped_gemm_varlen_k import grouped_gemm_varlen_k_reference
from moetrain.ops.reference_scatter_add_rows import scatter_add_rows_reference

T, D, F, E, K = 4096, 512, 128, 64, 8
N = T * K


@dataclass(frozen=True, slots=True)
class Layer:
    """Inputs of the layer's ops: rows of tokens, of pairs, weights, and the pairs grouped by expert."""

    x_TD: Tensor
    y_ND: Tensor
    h_NF: Tensor
    w_EFD: Tensor
    weight_N: Tensor
    token_N: Tensor
    offset_E1: Tensor


def make_layer(dtype: torch.dtype, device: str) -> Layer:
    random = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random).to(device, dtype)

    expert_id_TK = torch.rand(T, E, generator=random).topk(K).indices.to(device, torch.int32)
    pair_N, offset_E1 = group_pairs(expert_id_TK.flatten(), E)
    weight_N = torch.rand(N, generator=random).to(device)
    rows = normal(T, D), normal(N, D), normal(N, 2 * F)
    return Layer(*rows, normal(E, 2 * F, D), weight_N, (pair_N // K).to(torch.int32), offset_E1)


def check(ours: Tensor, wanted: Tensor) -> None:
    """Refuse to time answers that differ by more than a few roundings of the largest sum."""
    bound = 8 * torch.finfo(ours.dtype).eps * wanted.abs().max().item()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=bound)


def checked(case: str, competitors: Mapping[str, Callable[[], Tensor]], rounds: int) -> Row:
    check(competitors["moetrain"](), competitors["definition"]())
    return compare(case, competitors, rounds=rounds)


def bench_moves(layer: Layer, dtype: str, rounds: int) -> list[Row]:
    x, y, row, weight = layer.x_TD, layer.y_ND, layer.token_N, layer.weight_N
    gather = {"moetrain": lambda: gather_rows(x, row), "definition": lambda: gather_rows_reference(x, row)}
    scatter = {
        "moetrain": lambda: scatter_add_rows(y, row, weight, num_rows=T),
        "definition": lambda: scatter_add_rows_reference(y, row, weight, num_rows=T),
    }
    return [
        checked(f"gather_rows, {dtype}", gather, rounds),
        checked(f"scatter_add_rows, weighted, {dtype}", scatter, rounds),
    ]


def bench_products(layer: Layer, dtype: str, rounds: int) -> list[Row]:
    x, y, h, w, row, offset = layer.x_TD, layer.y_ND, layer.h_NF, layer.w_EFD, layer.token_N, layer.offset_E1
    varlen_m = {
        "moetrain": lambda: grouped_gemm(x, w, offset, row_M=row),
        "definition": lambda: grouped_gemm_reference(x, w, offset, row_M=row),
        "one matmul": lambda: y @ w[0].T,
    }
    varlen_k = {
        "moetrain": lambda: grouped_gemm_varlen_k(h, x, offset, row_b_M=row, num_slots=E),
        "definition": lambda: grouped_gemm_varlen_k_reference(h, x, offset, row_b_M=row, num_slots=E),
        "one matmul": lambda: h.T @ y,
    }
    return [
        checked(f"grouped_gemm, gathered rows, {dtype}", varlen_m, rounds),
        checked(f"grouped_gemm_varlen_k, gathered rows, {dtype}", varlen_k, rounds),
    ]


def main() -> None:
    chosen = arguments(__doc__ or "")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        layer, name = make_layer(dtype, chosen.device), str(dtype).removeprefix("torch.")
        rows += [*bench_moves(layer, name, chosen.rounds), *bench_products(layer, name, chosen.rounds)]
    report("row_ops", rows, save_as=chosen.save_as)


if __name__ == "__main__":
    main()
