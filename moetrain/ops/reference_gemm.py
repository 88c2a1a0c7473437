"""What ``moetrain.ops.gemm`` must compute, in plain differentiable torch: a loop over groups, for tests and reading.

Shapes: M rows in all (a capacity), E groups, S slots, N and K the sides of a weight matrix, I and J those of a weight
gradient, T rows of a matrix that a list picks from. Rows beyond ``offset_E1[-1]``, which the native operators leave
unwritten, are zero here.
"""

import torch
from torch import Tensor


def grouped_gemm_reference(
    a_MK: Tensor,
    b_SNK: Tensor,
    offset_E1: Tensor,
    *,
    slot_E: Tensor | None = None,
    row_M: Tensor | None = None,
    b_is_kn: bool = False,
) -> Tensor:
    """Return each group's rows times its slot's matrix, transposed unless it is stored ``[K, N]``."""
    a_MK = a_MK if row_M is None else a_MK[row_M.long()]
    b_SKN = b_SNK if b_is_kn else b_SNK.mT
    c_MN = a_MK.new_zeros(a_MK.shape[0], b_SKN.shape[2])
    for group, (begin, end) in enumerate(zip(offset_E1[:-1].tolist(), offset_E1[1:].tolist(), strict=True)):
        slot = group if slot_E is None else int(slot_E[group])
        c_MN[begin:end] = a_MK[begin:end] @ b_SKN[slot]
    return c_MN


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
