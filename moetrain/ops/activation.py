"""The nonlinearities of experts, elementwise in torch. Shapes: N rows, F hidden width."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.config.moe import Activation


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


def activate_backward(da_NF: Tensor, h_NH: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """``activate(h_NH)``, and what a gradient of it makes of ``da_NF``: the gradient of ``h_NH``."""
    if activation == "swiglu":
        gate_NF, up_NF = h_NH.chunk(2, dim=-1)
        sigma_NF = gate_NF.sigmoid()
        silu_NF = gate_NF * sigma_NF
        dsilu_NF = sigma_NF + silu_NF * (1 - sigma_NF)
        return silu_NF * up_NF, torch.cat((da_NF * up_NF * dsilu_NF, da_NF * silu_NF), dim=-1)
    if activation == "gelu":
        cdf_NF = torch.special.ndtr(h_NH)
        density_NF = torch.exp(-0.5 * h_NH.square()) / math.sqrt(2 * math.pi)
        return h_NH * cdf_NF, da_NF * (cdf_NF + h_NH * density_NF)
    if activation == "relu2":
        positive_NF = functional.relu(h_NH)
        return positive_NF.square(), 2 * da_NF * positive_NF
    raise ValueError(f"activation must be 'swiglu', 'gelu' or 'relu2', got {activation!r}")
