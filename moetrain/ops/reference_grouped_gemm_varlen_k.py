"""What ``moetrain.ops.grouped_gemm_varlen_k`` must compute, in plain differentiable torch, for tests and reading.

Shapes: M rows in all (a capacity), E groups, S slots, I and J the sides of a weight gradient, T rows of a matrix that a
list picks from.
"""

import torch
from torch import Tensor


def grouped_gemm_varlen_k_reference(
    a_MI: Tensor,
    b_MJ: Tensor,
    offset_E1: Tensor,
    *,
    slot_E: Tensor | None = None,
    row_a_M: Tensor | None = None,
    row_b_M: Tensor | None = None,
    num_slots: int,
) -> Tensor:
    """Return, for each slot, ``a.T @ b`` over the rows of its groups."""
    a_MI = a_MI if row_a_M is None else a_MI[row_a_M.long()]
    b_MJ = b_MJ if row_b_M is None else b_MJ[row_b_M.long()]
    groups_of: list[list[Tensor]] = [[] for _ in range(num_slots)]
    for group, (begin, end) in enumerate(zip(offset_E1[:-1].tolist(), offset_E1[1:].tolist(), strict=True)):
        row = torch.arange(begin, end, device=a_MI.device)
        groups_of[group if slot_E is None else int(slot_E[group])].append(row)
    empty = torch.zeros(0, dtype=torch.int64, device=a_MI.device)
    rows = [torch.cat([empty, *groups]) for groups in groups_of]
    products = [a_MI[row].T @ b_MJ[row] for row in rows]
    return torch.stack(products) if products else a_MI.new_zeros(0, a_MI.shape[1], b_MJ.shape[1])
