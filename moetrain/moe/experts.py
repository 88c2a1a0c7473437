"""The expert MLPs, routed and shared. Shapes: R rows, D width, F hidden width, N pairs, e experts held here."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.config.model import Activation
from moetrain.ops import grouped_gemm, scatter_add_rows
from moetrain.placement.store import ExpertWeights


def activate(h_NH: Tensor, activation: Activation) -> Tensor:
    """[N, 2F] -> [N, F] for swiglu (gate first, then up), [N, F] -> [N, F] otherwise."""
    if activation == "swiglu":
        gate_NF, up_NF = h_NH.chunk(2, dim=-1)
        return functional.silu(gate_NF) * up_NF
    if activation == "gelu":
        return functional.gelu(h_NH)
    if activation == "relu2":
        return functional.relu(h_NH).square()
    raise ValueError(f"activation must be 'swiglu', 'gelu' or 'relu2', got {activation!r}")


def run_experts(
    x_RD: Tensor,
    row_N: Tensor,
    weight_N: Tensor,
    offset_e1: Tensor,
    weights: ExpertWeights,
    activation: Activation,
) -> Tensor:
    """y[r] = sum over r's pairs, experts ascending, of weight * (activate(x[r] @ w_in.T) @ w_out.T).

    Args:
        x_RD: rows.
        row_N: int32, the row of each pair; pairs are grouped by expert, what lies beyond ``offset_e1[-1]`` is ignored.
        weight_N: at least float32.
        offset_e1: int32, over the experts held here, ascending.
        weights: slots may have any stride; ``slot_E`` maps experts to slots.
        activation: of the hidden layer.

    Returns:
        [R, D]; a row without pairs is zero.
    """
    h_NH = grouped_gemm(x_RD, weights.w_in.flatten(1, 2), offset_e1, slot_E=weights.slot_E, row_M=row_N)
    y_ND = grouped_gemm(activate(h_NH, activation), weights.w_out, offset_e1, slot_E=weights.slot_E)
    return scatter_add_rows(y_ND, row_N, weight_N, offset_e1, num_rows=x_RD.shape[0])


class SharedExpert(nn.Module):
    """One MLP that every token passes through, with an optional sigmoid gate (Qwen2-MoE).

    ``w_in`` [2 or 1, F, D], ``w_out`` [D, F] and ``gate`` [1, D] are zero until the model fills them.
    """

    def __init__(self, width: int, hidden: int, activation: Activation, *, gate: bool) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.w_in = nn.Parameter(torch.zeros(2 if activation == "swiglu" else 1, hidden, width))
        self.w_out = nn.Parameter(torch.zeros(width, hidden))
        self.gate = nn.Parameter(torch.zeros(1, width)) if gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        h_TF = activate(functional.linear(x_TD, self.w_in.flatten(0, 1)), self.activation)
        y_TD = functional.linear(h_TF, self.w_out)
        if self.gate is None:
            return y_TD
        at_least_fp32 = torch.promote_types(x_TD.dtype, torch.float32)
        gate_T1 = functional.linear(x_TD.to(at_least_fp32), self.gate.to(at_least_fp32)).sigmoid()
        return (y_TD * gate_T1).to(x_TD.dtype)
