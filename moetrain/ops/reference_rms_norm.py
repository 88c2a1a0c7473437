"""What ``moetrain.ops.rms_norm`` must compute, in plain differentiable torch; also what other devices than CPUs run."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight in at least fp32, rounded once."""
    at_least_fp32 = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(at_least_fp32)
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * weight_D.to(at_least_fp32)).to(x.dtype)
