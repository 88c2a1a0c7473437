"""What ``moetrain.ops.grouped_gemm`` must compute, in plain differentiable torch: a loop over groups, for tests.

Shapes: M rows in all (a capacity), E groups, S slots, N and K the sides of a weight matrix, T rows of a matrix that a
list picks from. Rows beyond ``offset_E1[-1]``, which the native operator leaves unwritten, are zero here.
"""

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
