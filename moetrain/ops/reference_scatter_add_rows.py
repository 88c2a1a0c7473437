"""What ``moetrain.ops.scatter_add_rows`` must compute, in plain differentiable torch: slow, obvious, for tests.

Shapes: T rows of the result, D width, N list entries (a capacity), E groups.
"""

import torch
from torch import Tensor


def scatter_add_rows_reference(
    y_ND: Tensor, row_N: Tensor, weight_N: Tensor | None = None, offset_E1: Tensor | None = None, *, num_rows: int
) -> Tensor:
    """Return the weighted sum of y's rows by destination, in at least fp32, rounded once to y's dtype."""
    length = row_N.shape[0] if offset_E1 is None else int(offset_E1[-1])
    sum_dtype = torch.promote_types(y_ND.dtype, torch.float32)
    term_ND = y_ND[:length].to(sum_dtype)
    if weight_N is not None:
        term_ND = weight_N[:length, None] * term_ND
    x_TD = term_ND.new_zeros(num_rows, y_ND.shape[1]).index_add(0, row_N[:length], term_ND)
    return x_TD.to(y_ND.dtype)
