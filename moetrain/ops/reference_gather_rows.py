"""What ``moetrain.ops.gather_rows`` must compute, in plain differentiable torch: slow, obvious, for tests and reading.

Shapes: T rows of the matrix, D width, N list entries (a capacity), E groups. Rows beyond ``offset_E1[-1]``, which the
native operators leave unwritten, are zero here.
"""

import torch
from torch import Tensor


def gather_rows_reference(x_TD: Tensor, row_N: Tensor, offset_E1: Tensor | None = None) -> Tensor:
    """Return ``x_TD[row_N]``, zero beyond the list's true length."""
    length = row_N.shape[0] if offset_E1 is None else int(offset_E1[-1])
    y_ND = x_TD.index_select(0, row_N[:length])
    return torch.cat([y_ND, y_ND.new_zeros(row_N.shape[0] - length, x_TD.shape[1])])
