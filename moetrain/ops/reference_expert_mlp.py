"""What ``moetrain.ops.expert_mlp`` must compute, in plain torch: a loop over experts, for tests and reading.

Shapes: R rows, D width, F hidden width, N pairs, E experts, S slots (stacked weights). The forward differentiates by
autograd; the backward is a second, independent definition: SonicMoE's (arXiv 2512.14080), which needs no output Y.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional


def expert_mlp_reference(
    x_RD: Tensor,
    row_N: Tensor,
    weight_N: Tensor,
    offset_E1: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    slot_E: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """y[r] = sum over r's pairs, experts ascending, of weight * (act(x[r] @ w_in.T + b_in) @ w_out.T + b_out).

    The sum runs in at least fp32 and is rounded once; a matrix product rounds its result to x's dtype.
    """
    sum_dtype = torch.promote_types(x_RD.dtype, torch.float32)
    y_RD = torch.zeros(x_RD.shape, dtype=sum_dtype, device=x_RD.device)
    for begin, end, slot in _experts(offset_E1, slot_E):
        row = row_N[begin:end].long()
        h_HNF = x_RD[row] @ w_in[slot].mT
        if b_in is not None:
            h_HNF = h_HNF + b_in[slot][:, None]
        out_ND = _activate(h_HNF, activation) @ w_out[slot].T
        if b_out is not None:
            out_ND = out_ND + b_out[slot]
        y_RD = y_RD.index_add(0, row, weight_N[begin:end, None] * out_ND.to(sum_dtype))
    return y_RD.to(x_RD.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMlpGradients:
    """Gradients of everything that ``expert_mlp`` differentiates; ``db_*`` are None where there is no bias."""

    dx_RD: Tensor
    dweight_N: Tensor
    dw_in: Tensor
    dw_out: Tensor
    db_in: Tensor | None
    db_out: Tensor | None


def expert_mlp_backward_reference(
    dy_RD: Tensor,
    x_RD: Tensor,
    row_N: Tensor,
    weight_N: Tensor,
    offset_E1: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    slot_E: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "swiglu",
) -> ExpertMlpGradients:
    """Return the gradients for ``dy_RD``, from X and the pre-activations alone: dS = <dA', A>, without Y."""
    dx_RD, dweight_N = torch.zeros_like(x_RD), torch.zeros_like(weight_N)
    dw_in, dw_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
    db_in = None if b_in is None else torch.zeros_like(b_in)
    db_out = None if b_out is None else torch.zeros_like(b_out)
    for begin, end, slot in _experts(offset_E1, slot_E):
        row, s_N1 = row_N[begin:end].long(), weight_N[begin:end, None]
        x_ND, dy_ND = x_RD[row], dy_RD[row]
        h_HNF = x_ND @ w_in[slot].mT
        if b_in is not None:
            h_HNF = h_HNF + b_in[slot][:, None]
        a_NF = _activate(h_HNF, activation)
        da_NF = dy_ND @ w_out[slot]  # of the unweighted output: the paper's dA'
        dweight_N[begin:end] = (da_NF * a_NF).sum(dim=1)
        dh_HNF = _activate_backward(s_N1 * da_NF, h_HNF, activation)
        dx_RD.index_add_(0, row, (dh_HNF @ w_in[slot]).sum(dim=0))
        dw_in[slot] += dh_HNF.mT @ x_ND
        dw_out[slot] += dy_ND.T @ (s_N1 * a_NF)
        if db_in is not None:
            db_in[slot] += dh_HNF.sum(dim=1)
        if b_out is not None and db_out is not None:
            dweight_N[begin:end] += dy_ND @ b_out[slot]
            db_out[slot] += (s_N1 * dy_ND).sum(dim=0)
    return ExpertMlpGradients(dx_RD, dweight_N, dw_in, dw_out, db_in, db_out)


def _experts(offset_E1: Tensor, slot_E: Tensor | None) -> list[tuple[int, int, int]]:
    """First pair, end and slot of each expert."""
    spans = list(pairwise(offset_E1.tolist()))
    slots = range(len(spans)) if slot_E is None else slot_E.tolist()
    return [(begin, end, slot) for (begin, end), slot in zip(spans, slots, strict=True)]


def _activate(h_HNF: Tensor, activation: str) -> Tensor:
    """[2, N, F] (gate, up) or [1, N, F] -> [N, F]."""
    if activation == "swiglu":
        gate_NF, up_NF = h_HNF
        return gate_NF * torch.sigmoid(gate_NF) * up_NF
    if activation == "gelu":
        return functional.gelu(h_HNF[0])
    return functional.relu(h_HNF[0]).square()


def _activate_backward(da_NF: Tensor, h_HNF: Tensor, activation: str) -> Tensor:
    """Return dH, shaped as H."""
    if activation == "swiglu":
        gate_NF, up_NF = h_HNF
        sigma_NF = torch.sigmoid(gate_NF)
        silu_slope_NF = sigma_NF * (1 + gate_NF * (1 - sigma_NF))
        return torch.stack((da_NF * up_NF * silu_slope_NF, da_NF * gate_NF * sigma_NF))
    if activation == "gelu":
        density_HNF = torch.exp(-h_HNF.square() / 2) / (2 * torch.pi) ** 0.5
        return da_NF * (torch.special.ndtr(h_HNF) + h_HNF * density_HNF)
    return da_NF * 2 * functional.relu(h_HNF)
