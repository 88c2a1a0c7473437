"""Time the row ops and grouped GEMMs against plain torch on one layer's shapes, after checking that both agree.

Competitors alternate (A B A B ...) in one run; the table has medians, their ratio and, for products, the achieved
TFLOP/s beside what one large torch matmul of the same dtype reaches on this machine in the same run.

    python benchmarks/bench_row_ops.py --tokens 4096 --width 512 --hidden 128 --experts 64 --top-k 8 --json out.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moetrain.ops import gather_rows, group_pairs, grouped_gemm, grouped_gemm_varlen_k, scatter_add_rows
from moetrain.ops.reference_gemm import grouped_gemm_reference, grouped_gemm_varlen_k_reference
from moetrain.ops.reference_rows import gather_rows_reference, scatter_add_rows_reference

Competitors = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def median_ms(competitors: Competitors, repeats: int) -> tuple[float, float]:
    """Return the median milliseconds of each, called in turn."""
    times_ms: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for competitor, own_ms in zip(competitors, times_ms, strict=True):
            begin = time.perf_counter()
            competitor()
            own_ms.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times_ms[0]), statistics.median(times_ms[1])


def check(name: str, competitors: Competitors, dtype: torch.dtype) -> None:
    """Refuse to time answers that differ by more than a few roundings of the sum."""
    ours, torchs = (competitor().double() for competitor in competitors)
    error, bound = (ours - torchs).abs().max().item(), 8 * torch.finfo(dtype).eps * torchs.abs().max().item()
    if not error <= bound:
        raise RuntimeError(f"{name}: native and torch differ by {error:.2e}, more than {bound:.2e}")


def cases(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, tuple[float, Competitors]]:
    """Return, by name, the FLOP of a call (0 for moves) and the two competitors (native, torch)."""
    T, D, F, E, K = args.tokens, args.width, args.hidden, args.experts, args.top_k
    expert_id_TK = torch.rand(T, E).topk(K).indices.to(torch.int32)
    pair_N, offset_E1 = group_pairs(expert_id_TK.view(-1).contiguous(), E)
    token_N = (pair_N // K).to(torch.int32)
    x_TD, y_ND = torch.randn(T, D, dtype=dtype), torch.randn(T * K, D, dtype=dtype)
    h_NF = torch.randn(T * K, 2 * F, dtype=dtype)
    w_EFD = torch.randn(E, 2 * F, D, dtype=dtype)
    weight_N = torch.rand(T * K)
    flop = 2.0 * T * K * D * 2 * F
    return {
        "gather_rows": (0.0, (lambda: gather_rows(x_TD, token_N), lambda: gather_rows_reference(x_TD, token_N))),
        "scatter_add_rows": (
            0.0,
            (
                lambda: scatter_add_rows(y_ND, token_N, weight_N, num_rows=T),
                lambda: scatter_add_rows_reference(y_ND, token_N, weight_N, num_rows=T),
            ),
        ),
        "grouped_gemm, gathered rows": (
            flop,
            (
                lambda: grouped_gemm(x_TD, w_EFD, offset_E1, row_M=token_N),
                lambda: grouped_gemm_reference(x_TD, w_EFD, offset_E1, row_M=token_N),
            ),
        ),
        "grouped_gemm_varlen_k, gathered rows": (
            flop,
            (
                lambda: grouped_gemm_varlen_k(h_NF, x_TD, offset_E1, row_b_M=token_N, num_slots=E),
                lambda: grouped_gemm_varlen_k_reference(h_NF, x_TD, offset_E1, row_b_M=token_N, num_slots=E),
            ),
        ),
    }


def matmul_tflops(dtype: torch.dtype, repeats: int) -> float:
    """Return what a 2048-cubed torch matmul reaches here: the peak that products are compared with."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    both: Competitors = (lambda: a @ b, lambda: a @ b)
    return 2 * 2048**3 / (1e9 * min(median_ms(both, repeats)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("width", 512), ("hidden", 128), ("experts", 64), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)

    peak = matmul_tflops(dtype, args.repeats)
    print(f"{torch.get_num_threads()} threads, {args.dtype}, 2048^3 torch matmul {peak:.3f} TFLOP/s")
    print(f"{'op':38s} {'native ms':>10s} {'torch ms':>10s} {'ratio':>7s} {'TFLOP/s':>9s} {'of matmul':>10s}")
    rows = []
    for name, (flop, competitors) in cases(args, dtype).items():
        check(name, competitors, dtype)
        native_ms, torch_ms = median_ms(competitors, args.repeats)
        tflops = flop / (1e9 * native_ms)
        speed = f"{tflops:9.3f} {tflops / peak:10.0%}" if flop else ""
        print(f"{name:38s} {native_ms:10.2f} {torch_ms:10.2f} {torch_ms / native_ms:7.2f} {speed}")
        rows.append({"op": name, "native_ms": native_ms, "torch_ms": torch_ms, "tflops": tflops})
    if args.json:
        shape = {key: value for key, value in vars(args).items() if key != "json"}
        where = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        report = {**where, **shape, "threads": torch.get_num_threads(), "matmul_tflops": peak, "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
