"""Checks a step's plan, on one thread of the CPU.

Shapes: N sequences, I items, M ranks of all items, R ranks. See ``moetrain.sequence.SequencePlan``.
"""

import torch
from torch import Tensor

from moetrain.ops.native import OPS


def check_sequence_plan(
    sequence_N3: Tensor,
    round_I: Tensor,
    offset_I1: Tensor,
    member_N: Tensor,
    rank_offset_I1: Tensor,
    rank_M: Tensor,
    offload_I: Tensor,
    est_ms_I: Tensor,
    rounds_R: Tensor,
    *,
    block: int,
    capacity: int,
    num_layers: int,
) -> None:
    """Prove that each sequence is in one item, that no rank exceeds its capacity, and that the order rule holds.

    Args:
        sequence_N3: int64, id, tokens and loss tokens.
        round_I: int32, of each item.
        offset_I1: int64, where each item's members begin.
        member_N: int32, rows of ``sequence_N3``.
        rank_offset_I1: int64, where each item's ranks begin.
        rank_M: int32, ascending within an item.
        offload_I: float64, share of an item's activations kept on the host.
        est_ms_I: float64.
        rounds_R: int32, rounds that each rank runs.
        block: neighbouring ranks that share all-to-alls.
        capacity: tokens whose activations a rank can hold.
        num_layers: layers that have activations.

    Raises:
        ValueError: naming the item, rank or sequence that breaks a rule.
        TypeError: a wrong dtype.
    """
    OPS.check_sequence_plan(
        sequence_N3, round_I, offset_I1, member_N, rank_offset_I1, rank_M, offload_I, est_ms_I, rounds_R,
        block, capacity, num_layers,
    )  # fmt: skip


@torch.library.register_fake("moetrain::check_sequence_plan")
def _check_sequence_plan_fake(*_: object) -> None:
    return None
