"""How selection biases move after an optimizer step, without a gradient. Shapes: E experts."""

import torch
from torch import Tensor


@torch.no_grad()
def sign_rule(count_E: Tensor, rate: float, bias_E: Tensor) -> None:
    """Move ``bias_E`` in place: b += rate * sign(mean(c) - c), in whole numbers, so balance is exact (2408.15664).

    Args:
        count_E: int64, the step's choices over all ranks.
        rate: u.
        bias_E: at least float32.
    """
    direction_E = (count_E.sum() - count_E * count_E.shape[0]).sign()
    bias_E += rate * direction_E.to(bias_E.dtype)
