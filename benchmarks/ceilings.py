"""What this machine can do at most, measured in the run that the figures come from: products and copies.

A share of a ceiling says how much is left to win; a ceiling taken from a data sheet or another day says nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import Shape

from moetrain import _C

_SIDES = {"cpu": ((1024, 1024, 4096), (2048, 2048, 2048)), "cuda": ((8192, 8192, 8192), (16384, 4096, 4096))}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of several repetitions each, with the threads that were set.

    Attributes:
        matmul_tflops: one dense product of torch, the better of two shapes.
        native_tflops: our own inner loop on operands that stay in cache; None where the build has none.
        copy_gbps: bytes read plus bytes written by one large copy.
    """

    matmul_tflops: float
    native_tflops: float | None
    copy_gbps: float

    @property
    def tflops(self) -> float:
        """The highest rate of products seen on this machine."""
        return max(self.matmul_tflops, self.native_tflops or 0.0)


@dataclass(frozen=True, slots=True)
class BatchedBound:
    """Milliseconds of a layer's products alone, as batched ones of equal groups; nothing is gathered or activated.

    No way to run the experts on cuBLAS (on the CPU: torch's GEMM) is faster, for real groups differ in size.
    """

    forward_ms: float
    forward_backward_ms: float


def measure_batched_bound(shape: Shape, dtype: torch.dtype, device: str) -> BatchedBound:
    """Two batched products forward, four more backward, each of E groups of N / E rows, rounded up."""
    rows = -(-shape.num_pairs // shape.E)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(shape.E, *sizes, device=device).to(dtype)

    x, w_in = normal(rows, shape.D), normal(2 * shape.F, shape.D)
    a, w_out = normal(rows, shape.F), normal(shape.D, shape.F)
    h, y = normal(rows, 2 * shape.F), normal(rows, shape.D)

    def forward() -> None:
        torch.bmm(x, w_in.mT)
        torch.bmm(a, w_out.mT)

    def backward() -> None:
        torch.bmm(y, w_out)
        torch.bmm(y.mT, a)
        torch.bmm(h, w_in)
        torch.bmm(h.mT, x)

    forward_ms = 1e3 * _best_seconds(forward, device)
    return BatchedBound(forward_ms, forward_ms + 1e3 * _best_seconds(backward, device))


def measure_ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """Measure all ceilings for products of ``dtype``; some seconds."""
    kind = torch.device(device).type
    return Ceilings(
        matmul_tflops=max(_matmul_tflops(dtype, device, *sides) for sides in _SIDES[kind]),
        native_tflops=_native_tflops(dtype) if kind == "cpu" else None,
        copy_gbps=_copy_gbps(device, _COPY_BYTES[kind]),
    )


def higher(one: Ceilings, other: Ceilings) -> Ceilings:
    """The better of two measurements: a ceiling is what was reached at least once."""
    natives = [tflops for tflops in (one.native_tflops, other.native_tflops) if tflops is not None]
    return Ceilings(
        max(one.matmul_tflops, other.matmul_tflops),
        max(natives, default=None),
        max(one.copy_gbps, other.copy_gbps),
    )


def _matmul_tflops(dtype: torch.dtype, device: str, rows: int, columns: int, inner: int) -> float:
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    return 2 * rows * columns * inner / _best_seconds(lambda: a @ b.T, device) / 1e12


def _native_tflops(dtype: torch.dtype) -> float:
    """What one thread reaches, times threads: cores that share power may not hold it, and then it is too high."""
    return _C.gemm_ceiling(str(dtype).removeprefix("torch.")) * torch.get_num_threads()


def _copy_gbps(device: str, num_bytes: int) -> float:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_seconds(lambda: target.copy_(source), device) / 1e9


def _best_seconds(call: Callable[[], object], device: str) -> float:
    call()
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
