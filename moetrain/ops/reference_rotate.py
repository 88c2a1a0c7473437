"""What ``moetrain.ops.rotate`` must compute, in plain differentiable torch; also what other devices than CPUs run."""

import torch
from torch import Tensor


def rotate_reference(x_BSHd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> Tensor:
    """Turn element pairs (i, i + d/2) in the tables' type, and round once."""
    cos_BS1d, sin_BS1d = cos_BSd[:, :, None], sin_BSd[:, :, None]
    first, second = x_BSHd.to(cos_BSd.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos_BS1d - second * sin_BS1d, second * cos_BS1d + first * sin_BS1d), dim=-1)
    return turned.to(x_BSHd.dtype)
