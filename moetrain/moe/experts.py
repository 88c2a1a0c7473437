"""The expert MLPs, routed and shared. Shapes: R rows, D width, F hidden width, N pairs, e experts held here."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.config.model import Activation
from moetrain.ops import expert_mlp
from moetrain.ops.activation import activate
from moetrain.placement.store import ExpertWeights


def run_experts(
    x_RD: Tensor,
    row_N: Tensor,
    weight_N: Tensor,
    offset_e1: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    recompute_hidden: bool = False,
) -> Tensor:
    """y[r] = sum over r's pairs, experts ascending, of weight * (activate(x[r] @ w_in.T) @ w_out.T).

    The backward pass keeps x and the pre-activations of each pair; see ``expert_mlp`` for the bytes.

    Args:
        x_RD: rows.
        row_N: int32, the row of each pair; pairs are grouped by expert, what lies beyond ``offset_e1[-1]`` is ignored.
        weight_N: at least float32.
        offset_e1: int32, over the experts held here, ascending.
        weights: slots may have any stride; ``slot_E`` maps experts to slots.
        activation: of the hidden layer.
        recompute_hidden: keep x alone and compute the pre-activations again.

    Returns:
        [R, D]; a row without pairs is zero.
    """
    return expert_mlp(
        x_RD,
        row_N,
        weight_N,
        offset_e1,
        weights.w_in,
        weights.w_out,
        slot_E=weights.slot_E,
        activation=activation,
        recompute_h=recompute_hidden,
    )


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
