"""Group (token, choice) pairs by expert.

Shapes: P pairs handed in, N = P capacity of the grouped list, E experts, E1 = E + 1.
"""

import torch
from torch import Tensor

from moetrain.ops.native import OPS


def group_pairs(expert_id_P: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the positions of ``expert_id_P`` by expert, stably: a counting sort.

    Args:
        expert_id_P: int32 ``[P]``, each in ``[0, num_experts)`` or -1 for "no expert" (dropped, null or invalid).
        num_experts: E; 0 is allowed, for a rank without experts.

    Returns:
        ``pair_N`` int32 ``[P]``, a permutation of the positions, and ``offset_E1`` int32 ``[E + 1]``: expert e has
        ``pair_N[offset_E1[e] : offset_E1[e + 1]]``, ascending. Positions of -1 follow ``offset_E1[E]``.
        Neither has a gradient.

    Raises:
        TypeError: ``expert_id_P`` is not int32.
        ValueError: a wrong shape or stride, more than 2**31 - 1 pairs, or an id outside the range, with its position.
            On CUDA ids are read only where the environment has ``MOETRAIN_DEBUG=1``, since the check waits for the
            device; without it such a pair counts as -1.
    """
    return OPS.group_pairs(expert_id_P, num_experts)


@torch.library.register_fake("moetrain::group_pairs")
def _group_pairs_fake(expert_id_P: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(expert_id_P), expert_id_P.new_empty(num_experts + 1)
