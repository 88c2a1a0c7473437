"""What token rounding gains: expert_mlp on top-k's pairs and on the rounded ones, forward, and forward and backward.

    python benchmarks/bench_rounding_gain.py --device cuda --save-as my-gpu
    python benchmarks/bench_rounding_gain.py --tokens 2048 --only D1536-F256

Random routers; the nearest rule, tiles of 128 rows. A ratio above 1 is a gain; rows come and go, so the work is the
same but for the share of rows in the last column. SonicMoE's H100 gained 16.5 % forward and 6.1 % backward at
D = 1536, F = 1024, E = 128, K = 2, and 25.7 % and 11.8 % at D = 4096, F = 1024, E = 256, K = 4 (arXiv 2512.14080).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench_rounding import Routed, ours
from shapes import Shape, rounding_sweeps
from timing import RESULTS, compare, machine
from torch import Tensor

from moetrain.ops import expert_mlp

TOP_K, ROUNDED = "top-k", "rounded"


@dataclass(frozen=True, slots=True)
class Gain:
    """Milliseconds on both lists; rows of the rounded list over those of top-k."""

    shape: str
    forward_ms: dict[str, float]
    forward_backward_ms: dict[str, float]
    rows_ratio: float

    @property
    def ratios(self) -> tuple[float, float]:
        """Top-k's time over that of the rounded list: forward, forward and backward."""
        forward, both = self.forward_ms, self.forward_backward_ms
        return forward[TOP_K] / forward[ROUNDED], both[TOP_K] / both[ROUNDED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--only", default="", help="shapes whose name begins so")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save-as", default=None, help="hardware tag; writes results/rounding_gain_<tag>_<YYYYMM>.*")
    chosen = parser.parse_args()
    gains = []
    for shape in rounding_sweeps(chosen.tokens):
        if shape.name.startswith(chosen.only):
            gains.append(measure(shape, chosen.device, chosen.rounds))
            print(line(gains[-1]), flush=True)
            if chosen.save_as is not None:  # whole after each shape
                save(gains, RESULTS / f"rounding_gain_{chosen.save_as}_{time.strftime('%Y%m')}")
    if not gains:
        parser.error(f"--only must begin a name as D1536-F256-K8-E64 does, got {chosen.only!r}")


def measure(shape: Shape, device: str, rounds: int) -> Gain:
    """One shape, both lists in turns."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=random, device=device) * scale).bfloat16()

    x_TD = normal(shape.T, shape.D).requires_grad_()
    w_in = normal(shape.E, 2, shape.F, shape.D, scale=shape.D**-0.5).requires_grad_()
    w_out = normal(shape.E, shape.D, shape.F, scale=2 * shape.F**-0.5).requires_grad_()
    dy_TD = normal(shape.T, shape.D)
    routed = Routed.random(shape.T, shape.E, shape.K)
    rounded = ours(routed)
    lists = {TOP_K: (routed.token_N, routed.offset_E1), ROUNDED: (rounded.token_P, rounded.offset_E1)}
    forward, both, rows = {}, {}, {}
    for name, (token_N, offset_E1) in lists.items():
        rows[name] = int(offset_E1[-1])
        token_N, offset_E1 = token_N[: rows[name]].to(device), offset_E1.to(device)
        weight_N = torch.full((rows[name],), 1 / shape.K, device=device).requires_grad_()

        def run(token_N: Tensor = token_N, offset_E1: Tensor = offset_E1, weight_N: Tensor = weight_N) -> Tensor:
            return expert_mlp(x_TD, token_N, weight_N, offset_E1, w_in, w_out)

        forward[name] = run
        both[name] = lambda run=run, weight_N=weight_N: torch.autograd.grad(run(), (x_TD, weight_N, w_in, w_out), dy_TD)
    return Gain(
        shape.name,
        compare(shape.name, forward, rounds=rounds).median_ms,
        compare(shape.name, both, rounds=rounds).median_ms,
        rows[ROUNDED] / rows[TOP_K],
    )


HEAD = (
    "| shape | forward, ms | rounded | gain | forward + backward, ms | rounded | gain | rows |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)


def line(gain: Gain) -> str:
    """A row of the table under ``HEAD``."""
    (forward, both), f, b = gain.ratios, gain.forward_ms, gain.forward_backward_ms
    return (
        f"| {gain.shape} | {f[TOP_K]:.3f} | {f[ROUNDED]:.3f} | {forward:.3f} | {b[TOP_K]:.3f} | {b[ROUNDED]:.3f} "
        f"| {both:.3f} | {gain.rows_ratio:.4f} |"
    )


def save(gains: list[Gain], stem: Path) -> None:
    """Markdown and JSON."""
    where = machine()
    head = ["# token rounding's gain", "", *(f"- {key}: {value}" for key, value in where.items()), ""]
    stem.with_suffix(".md").write_text("\n".join([*head, *HEAD, *map(line, gains), ""]))
    values = {"machine": where, "rows": [{**asdict(gain), "ratios": gain.ratios} for gain in gains]}
    stem.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
