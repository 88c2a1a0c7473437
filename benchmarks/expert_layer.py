"""One routed layer to run experts on, the answer it must give, and the rule by which answers are judged.

Shapes: T tokens, D width, F hidden width, E experts, K per token, N = T * K pairs grouped by expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from shapes import Shape
from torch import Tensor
from torch.nn import functional

from moetrain.ops import group_pairs

QUANTITIES = ("y", "dx", "dweight", "dw_in", "dw_out")
HOUSE_MARGIN = 2.0
PEER_MARGIN = 4.0  # other libraries may round more often; what computes something else is far beyond this


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Inputs in all the forms that competitors take; routing is the same in all of them.

    Leaves are x_TD, weight_N (of the pairs, grouped by expert) or weight_TK, w_in_E2FD and w_out_EDF. ``pair_N`` says
    which entry of the flattened weight_TK each pair is.
    """

    shape: Shape
    x_TD: Tensor
    w_in_E2FD: Tensor
    w_out_EDF: Tensor
    dy_TD: Tensor
    expert_id_TK: Tensor  # int64
    weight_TK: Tensor  # float32 (float64 for float64)
    weight_N: Tensor
    pair_N: Tensor  # int32
    token_N: Tensor  # int32
    offset_E1: Tensor  # int32


@dataclass(frozen=True, slots=True, eq=False)
class Competitor:
    """One way to run the experts.

    Attributes:
        name: in tables.
        run: gives y_TD, ready for backward.
        leaves: what gradients are taken of: x first, then weights of pairs, then matrices, in its own shapes.
        canonical: turns those gradients into those of x_TD, weight_N, w_in_E2FD and w_out_EDF.
    """

    name: str
    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    canonical: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple

    def forward_backward(self, dy_TD: Tensor) -> tuple[Tensor, ...]:
        """All gradients."""
        return torch.autograd.grad(self.run(), self.leaves, dy_TD)

    def answers(self, dy_TD: Tensor) -> dict[str, Tensor]:
        """y and gradients by name, in the shapes that all are compared in."""
        y_TD = self.run()
        gradients = self.canonical(torch.autograd.grad(y_TD, self.leaves, dy_TD))
        return dict(zip(QUANTITIES, (y_TD.detach(), *gradients), strict=True))


def make_layer(shape: Shape, dtype: torch.dtype, device: str) -> Layer:
    """A layer with random weights and balanced random routing, such that x, h and y all have unit scale."""
    random = torch.Generator(device).manual_seed(0)
    at_least_fp32 = torch.promote_types(dtype, torch.float32)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=random, device=device) * scale).to(dtype)

    T, D, F, E, K = shape.T, shape.D, shape.F, shape.E, shape.K
    score_TK, expert_id_TK = torch.randn(T, E, generator=random, device=device).topk(K)
    weight_TK = score_TK.softmax(-1).to(at_least_fp32)
    pair_N, offset_E1 = group_pairs(expert_id_TK.flatten().to(torch.int32), E)
    return Layer(
        shape=shape,
        x_TD=normal(T, D).requires_grad_(),
        w_in_E2FD=normal(E, 2, F, D, scale=D**-0.5).requires_grad_(),
        w_out_EDF=normal(E, D, F, scale=2 * F**-0.5).requires_grad_(),
        dy_TD=normal(T, D),
        expert_id_TK=expert_id_TK,
        weight_TK=weight_TK.clone().requires_grad_(),
        weight_N=weight_TK.flatten()[pair_N.long()].requires_grad_(),
        pair_N=pair_N,
        token_N=torch.div(pair_N, K, rounding_mode="floor"),
        offset_E1=offset_E1,
    )


def definition(layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the layer must give, by the plainest torch there is, computed in ``dtype``; expert by expert.

    Only one expert's graph exists at a time, so that float64 fits where the competitors do.
    """
    x_TD, dy_TD = layer.x_TD.detach().to(dtype), layer.dy_TD.to(dtype)
    y_TD, dx_TD = torch.zeros_like(x_TD), torch.zeros_like(x_TD)
    dweights, dw_ins, dw_outs = [], [], []
    offsets = layer.offset_E1.tolist()
    for expert, (start, stop) in enumerate(pairwise(offsets)):
        token_M = layer.token_N[start:stop].long()
        parts = (layer.weight_N[start:stop], layer.w_in_E2FD[expert].flatten(0, 1), layer.w_out_EDF[expert])
        leaves = [part.detach().to(dtype).requires_grad_() for part in (x_TD[token_M], *parts)]
        x_MD, weight_M, w_in, w_out = leaves
        gate_MF, up_MF = functional.linear(x_MD, w_in).chunk(2, dim=-1)
        y_MD = functional.linear(functional.silu(gate_MF) * up_MF, w_out) * weight_M[:, None]
        dx_MD, dweight_M, dw_in, dw_out = torch.autograd.grad(y_MD, leaves, dy_TD[token_M])
        y_TD.index_add_(0, token_M, y_MD.detach())
        dx_TD.index_add_(0, token_M, dx_MD)
        dweights.append(dweight_M)
        dw_ins.append(dw_in.unflatten(0, (2, -1)))
        dw_outs.append(dw_out)
    answers = (y_TD, dx_TD, torch.cat(dweights), torch.stack(dw_ins), torch.stack(dw_outs))
    return dict(zip(QUANTITIES, answers, strict=True))


def largest_errors(answers: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute error of each quantity."""
    return {name: (answers[name].to(exact[name].dtype) - exact[name]).abs().max().item() for name in QUANTITIES}


def check(
    competitor: Competitor,
    layer: Layer,
    exact: dict[str, Tensor],
    plain: dict[str, float],
    *,
    margin: float = PEER_MARGIN,
) -> dict[str, float]:
    """Refuse to time wrong answers; returns the largest errors.

    An error may be ``margin`` times the largest of same-dtype torch, plus the type's smallest step at the largest value
    over 8. Ours is held to ``HOUSE_MARGIN``; others are shown with their errors, refused only far beyond it.

    Args:
        competitor: to be judged.
        layer: its inputs.
        exact: ``definition`` in float64.
        plain: largest errors of ``definition`` in the layer's own dtype.
        margin: see above.

    Raises:
        ValueError: an error is too large.
    """
    errors = largest_errors(competitor.answers(layer.dy_TD), exact)
    for name, error in errors.items():
        atol = torch.finfo(layer.x_TD.dtype).eps * exact[name].abs().max().item() / 8
        bound = margin * plain[name] + atol
        if not error <= bound:
            raise ValueError(
                f"{competitor.name} on {layer.shape}: the largest error of {name} must be at most {bound:.3e} "
                f"({margin:g} x {plain[name]:.3e}, that of same-dtype torch, + {atol:.1e}), got {error:.3e} "
                f"({error / plain[name]:.2f} x); nothing was timed; ours may be given a --margin for the time being"
            )
    return errors
