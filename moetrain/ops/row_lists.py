"""What the operators over lists of rows share: rows as the kernels take them, and a list's tail.

Shapes: N list entries (a capacity), E groups; ``offset_E1[-1]`` is the list's true length.
"""

import torch
from torch import Tensor


def rows_contiguous(x: Tensor) -> Tensor:
    """Return ``x``, copied if its rows overlap or are strided inside, as expanded gradients are."""
    if x.numel() == 0:
        return x
    inner_ok = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if inner_ok and (x.stride(-2) >= x.shape[-1] or x.shape[-2] == 1) else x.contiguous()


def zero_tail_(x: Tensor, offset_E1: Tensor | None) -> Tensor:
    """Set ``x`` to zero beyond ``offset_E1[-1]``, in place and without asking the host where that is; return it."""
    if offset_E1 is None:
        return x
    is_tail_N = torch.arange(x.shape[0], device=x.device) >= offset_E1[-1]
    return x.masked_fill_(is_tail_N.view(-1, *[1] * (x.dim() - 1)), 0)
