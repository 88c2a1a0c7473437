"""Root-mean-square normalisation. Shapes: D the normalised width."""

import torch
from torch import Tensor, nn

from moetrain.ops import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in at least fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] of the same type."""
        return rms_norm(x, self.weight, self.eps)
