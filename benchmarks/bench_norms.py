"""rms_norm and rotate against torch on the CPU.

Run: python benchmarks/bench_norms.py --threads 1

The quick start's layer (2048 tokens of width 256, 8 heads of 32) and a wider one (2048 tokens of width 2048, 16 heads
of 128). The definitions are what a model in plain torch computes; torch also has a norm of its own. Values and
gradients are compared before anything is timed.
"""

from collections.abc import Callable, Mapping

import torch
from timing import Row, arguments, compare, report
from torch import Tensor
from torch.nn import functional

from moetrain.ops import rms_norm, rotate
from moetrain.ops.reference_rms_norm import rms_norm_reference
from moetrain.ops.reference_rotate import rotate_reference

SHAPES = {"quickstart": (4, 512, 8, 32), "wide": (4, 512, 16, 128)}  # B, S, H, d
EPS = 1e-6

Competitors = Mapping[str, Callable[..., Tensor]]


def norms(width: int) -> Competitors:
    return {
        "moetrain": lambda x, weight: rms_norm(x, weight, EPS),
        "definition": lambda x, weight: rms_norm_reference(x, weight, EPS),
        "torch": lambda x, weight: functional.rms_norm(x, (width,), weight, EPS),
    }


def rotations(cos_BSd: Tensor, sin_BSd: Tensor) -> Competitors:
    return {
        "moetrain": lambda x: rotate(x, cos_BSd, sin_BSd),
        "definition": lambda x: rotate_reference(x, cos_BSd, sin_BSd),
    }


def bench(case: str, competitors: Competitors, leaves: list[Tensor], rounds: int) -> list[Row]:
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1)).to(leaves[0].dtype)
    answers = [(y := run(*leaves), *torch.autograd.grad(y, leaves, dy)) for run in competitors.values()]
    for theirs in answers[1:]:
        for ours, other in zip(answers[0], theirs, strict=True):
            bound = 16 * torch.finfo(ours.dtype).eps * max(1.0, other.abs().max().item())
            torch.testing.assert_close(ours, other, rtol=0, atol=bound)

    def forward(run: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: run(*leaves))

    def both(run: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(*leaves), leaves, dy)

    return [
        compare(f"{case}, forward", {who: forward(run) for who, run in competitors.items()}, rounds=rounds),
        compare(f"{case}, forward + backward", {who: both(run) for who, run in competitors.items()}, rounds=rounds),
    ]


def main() -> None:
    chosen = arguments(__doc__ or "")
    random = torch.Generator().manual_seed(0)
    rows = []
    for name, (num_rows, length, heads, head_dim) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            case = f"{name}, {str(dtype).removeprefix('torch.')}"
            width = heads * head_dim
            x_BSD = torch.randn(num_rows, length, width, generator=random).to(dtype)
            weight_D = torch.randn(width, generator=random).to(dtype)
            rows += bench(f"rms_norm, {case}", norms(width), [x_BSD, weight_D], chosen.rounds)
            angle_BSd = 100 * torch.rand(num_rows, length, head_dim // 2, generator=random)
            x_BSHd = torch.randn(num_rows, length, heads, head_dim, generator=random).to(dtype)
            rows += bench(f"rotate, {case}", rotations(angle_BSd.cos(), angle_BSd.sin()), [x_BSHd], chosen.rounds)
    report("norms", rows, save_as=chosen.save_as)


if __name__ == "__main__":
    main()
