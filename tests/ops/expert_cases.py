"""Inputs for expert_mlp's tests, and the rule by which its errors are judged.

Shapes: R rows, D width, F hidden width, N pairs (the last TAIL beyond the list's end), E experts, S slots.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.expert_inputs import ExpertInputs
from moetrain.ops.expert_parts import backward_of_parts, forward_of_parts
from moetrain.ops.reference_expert_mlp import expert_mlp_reference

TAIL = 3
# Half precision: of products. float32: of sums over rows, in whatever order. float64: also torch's own error, unknown.
ROUNDINGS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 16, torch.float64: 64}
DTYPES = list(ROUNDINGS)
SIZES = {
    "uneven": [7, 0, 13, 10, 3],
    "one pair": [0, 1, 0, 0, 0],
    "all to one": [0, 0, 0, 301, 0],
    "many tiles": [64, 33, 0, 97, 31, 1, 32],
    "no pairs": [0, 0, 0],
    "no experts": [],
}

ExpertMlp = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    x_RD: Tensor
    row_N: Tensor
    weight_N: Tensor
    offset_E1: Tensor
    w_in: Tensor
    w_out: Tensor
    slot_E: Tensor | None
    b_in: Tensor | None
    b_out: Tensor | None
    activation: str

    @property
    def num_pairs(self) -> int:
        return int(self.offset_E1[-1])

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x_RD, self.row_N, self.weight_N, self.offset_E1, self.w_in, self.w_out

    def kwargs(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("slot_E", "b_in", "b_out", "activation")}

    def positional(self) -> tuple[Any, ...]:
        """As the operators take them."""
        return *self.args(), *self.kwargs().values()

    def but(self, **changes: Any) -> "Case":
        return dataclasses.replace(self, **changes)

    def double(self) -> "Case":
        floats = {name: value.double() for name, value in self._floats().items()}
        return self.but(**floats)

    def leaves(self) -> "Case":
        return self.but(**{name: value.detach().requires_grad_() for name, value in self._floats().items()})

    def _floats(self) -> dict[str, Tensor]:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if isinstance(value, Tensor) and value.is_floating_point()}


def int32(values: Any, device: str = "cpu") -> Tensor:
    return torch.as_tensor(values, device=device).to(torch.int32)


def make_case(
    sizes: list[int],
    dtype: torch.dtype,
    *,
    rows: int = 23,
    width: int = 40,
    hidden: int = 24,
    activation: str = "swiglu",
    biases: bool = False,
    ascending: bool = False,
    aligned: bool = False,
    device: str = "cpu",
) -> Case:
    """Pairs in any order, rows several times in one expert; the last row in none; strided rows and slots.

    With ``ascending``, as a dispatcher lists them: each row once at most in an expert, in order.

    The last expert shares the first one's slot, and two slots are nobody's. The tail's rows and weights are garbage.
    Weights lie where kernels that load 16 bytes at a time cannot read them, unless ``aligned``.
    """
    random = torch.Generator().manual_seed(1000 * rows + 10 * width + hidden + sum(sizes))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype).to(device)

    halves = 2 if activation == "swiglu" else 1
    num_pairs, num_slots = sum(sizes), len(sizes) + 2
    row_N = torch.randint(max(1, rows - 1), (num_pairs + TAIL,), generator=random)
    if ascending:
        chosen = [torch.randperm(rows - 1, generator=random)[:size].sort().values for size in sizes]
        row_N = torch.cat((*chosen, row_N[:TAIL]))
    row_N[num_pairs:] = -7
    weight_N = 0.2 + torch.rand(num_pairs + TAIL, generator=random, dtype=torch.float64)
    weight_N[num_pairs:] = float("nan")
    slot_E = torch.randperm(num_slots, generator=random)[: len(sizes)]
    slot_E[-1:] = slot_E[:1]
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    gap = 8 if aligned else 5
    return Case(
        normal(rows, width + 7)[:, 3 : 3 + width],
        int32(row_N, device),
        weight_N.to(at_least_fp32).to(device),
        int32([0, *accumulate(sizes)], device),
        _strided_slots(normal(num_slots, halves * hidden * width + gap, scale=width**-0.5), gap, halves, hidden, width),
        _strided_slots(normal(num_slots, width * hidden + gap, scale=hidden**-0.5), gap, width, hidden),
        int32(slot_E, device),
        normal(num_slots, halves, hidden) if biases else None,
        normal(num_slots, width) if biases else None,
        activation,
    )


def _strided_slots(flat: Tensor, gap: int, *shape: int) -> Tensor:
    """Slots as a store's flat chunks hold them: each contiguous, with something else between them."""
    return flat[:, gap:].unflatten(1, shape)


def output_gradient(case: Case) -> Tensor:
    """Of unit scale, the same for every implementation."""
    random = torch.Generator().manual_seed(1)
    dy_RD = torch.randn(case.x_RD.shape, generator=random, dtype=torch.float64)
    return dy_RD.to(case.x_RD.dtype).to(case.x_RD.device)


def run(mlp: ExpertMlp, case: Case, dy_RD: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """The output, and the gradient of everything that has one."""
    leaves = case.leaves()
    y_RD = mlp(*leaves.args(), **leaves.kwargs(), **options)
    names = [name for name in ("x_RD", "weight_N", "w_in", "w_out", "b_in", "b_out") if getattr(case, name) is not None]
    inputs = [getattr(leaves, name) for name in names]
    if mlp is expert_mlp_reference and not case.offset_E1[-1]:  # a loop that never runs leaves autograd's graph
        grads = tuple(torch.zeros_like(tensor) for tensor in inputs)
    else:
        grads = torch.autograd.grad(y_RD, inputs, output_gradient(case) if dy_RD is None else dy_RD)
    return {"y_RD": y_RD.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}


class _OfParts(torch.autograd.Function):
    """expert_mlp as CUDA tensors get it where no kernel fits, on tensors of any device."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, activation, save_h, products = args
        y_RD, h = forward_of_parts(ExpertInputs(*tensors), activation, save_h, products)
        ctx.options = (activation, products)
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(*tensors, h if save_h else None)
        return y_RD, h

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor, _dh: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, h = ctx.saved_tensors
        *gradients, db_in, db_out = backward_of_parts(dy_RD, ExpertInputs(*tensors), h, *ctx.options)
        dx_RD, dweight_N, dw_in, dw_out = gradients
        biases = [db if needed else None for db, needed in zip((db_in, db_out), ctx.needs_input_grad[7:9], strict=True)]
        return dx_RD, None, dweight_N, None, dw_in, dw_out, None, *biases, None, None, None


def of_parts(products: str) -> ExpertMlp:
    """expert_mlp by the products of that name: "simple", "grouped_mm" or "loop"."""

    def mlp(*args: Tensor, recompute_h: bool = False, **kwargs: Any) -> Tensor:
        return _OfParts.apply(*args, *kwargs.values(), not recompute_h, products)[0]

    return mlp


def largest_error(mine: Tensor, exact: Tensor) -> float:
    assert mine.shape == exact.shape
    return (mine.double() - exact).abs().max().item() if mine.numel() else 0.0


def excess(mine: dict[str, Tensor], exact: dict[str, Tensor], torchs: dict[str, Tensor]) -> dict[str, float]:
    """By how much the largest error of each result is over the bound: at most 0 where it holds.

    The bound is twice torch's error and, since torch may be lucky in a small case, some roundings at the result's
    scale: ROUNDINGS.
    """
    assert mine.keys() == exact.keys()
    dtype = mine["y_RD"].dtype  # weights, and so their gradients, may have a wider one
    rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    over = {}
    for name, value in mine.items():
        assert value.dtype == torchs[name].dtype
        scale = max(1.0, exact[name].abs().max().item()) if value.numel() else 1.0
        error = largest_error(value, exact[name])
        bound = 2 * largest_error(torchs[name], exact[name]) + rounding * scale
        over[name] = error - bound if error == error else torch.inf
    return over
