"""Plans which ranks compute which sequences of a step together, on one thread of the CPU, without Python's lock.

Shapes: N sequences, I items, M ranks of all items, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES, SequenceCosts
from moetrain.ops.native import OPS


@dataclass(frozen=True, slots=True, eq=False)
class PlannedSequences:
    """A plan's arrays, as ``moetrain.sequence.SequencePlan`` has them. All on the CPU."""

    round_I: Tensor  # int32
    offset_I1: Tensor  # int64, where each item's members begin
    member_N: Tensor  # int32, sequences
    rank_offset_I1: Tensor  # int64, where each item's ranks begin
    rank_M: Tensor  # int32
    est_ms_I: Tensor  # float64
    rounds_R: Tensor  # int32
    lower_bound_ms: float  # no plan takes less, whatever its rounds
    est_makespan_ms: float


def plan_sequences(
    num_tokens_N: Tensor,
    *,
    planner: str,
    num_ranks: int,
    block: int,
    capacity: int,
    gang: int = 1,
    equal_rounds: bool = False,
    costs: SequenceCosts = UNMEASURED_SEQUENCES,
) -> PlannedSequences:
    """Deal sequences out to ranks and rounds. Equal inputs give equal plans on all machines.

    Args:
        num_tokens_N: int64, tokens of each sequence, at least 1.
        planner: ``data`` (a rank each, in order, as many to a round as it holds), ``context`` (gangs of one size
            instead), ``bytescale`` (as few ranks as hold a sequence, arXiv 2502.21231; short ones packed, to those who
            lag behind) or ``moetrain`` (as many ranks as level the work, in rounds that take all their ranks as long).
        num_ranks: R.
        block: neighbouring ranks that share all-to-alls, and so run the same number of rounds.
        capacity: tokens whose activations a rank can hold in one round.
        gang: ranks of every gang of ``context``.
        equal_rounds: all ranks must run the same number of rounds.
        costs: of sequences, by their tokens and ranks.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit, a sequence that all ranks (or ``data``'s one, or ``context``'s gang) together
            cannot hold, an unknown planner.
    """
    *arrays, bounds_2 = OPS.plan_sequences(
        num_tokens_N,
        planner,
        num_ranks,
        block,
        capacity,
        gang,
        equal_rounds,
        torch.tensor(costs.numbers(), dtype=torch.float64),
    )
    lower_bound_ms, est_makespan_ms = bounds_2.tolist()
    round_I, offset_I1, member_N, rank_offset_I1, rank_M, est_ms_I, rounds_R = arrays
    return PlannedSequences(
        *(round_I, offset_I1, member_N, rank_offset_I1, rank_M, est_ms_I, rounds_R), lower_bound_ms, est_makespan_ms
    )


@torch.library.register_fake("moetrain::plan_sequences")
def _plan_sequences_fake(num_tokens_N: Tensor, planner: str, num_ranks: int, *others: object) -> tuple[Tensor, ...]:
    num_items, num_item_ranks = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    sizes = {
        "int32": (num_items, len(num_tokens_N), num_item_ranks, num_ranks),
        "int64": (num_items + 1, num_items + 1),
    }
    round_I, member_N, rank_M, rounds_R = (num_tokens_N.new_empty(size, dtype=torch.int32) for size in sizes["int32"])
    offset_I1, rank_offset_I1 = (num_tokens_N.new_empty(size) for size in sizes["int64"])
    est_ms_I = num_tokens_N.new_empty(num_items, dtype=torch.float64)
    bounds_2 = num_tokens_N.new_empty(2, dtype=torch.float64)
    return round_I, offset_I1, member_N, rank_offset_I1, rank_M, est_ms_I, rounds_R, bounds_2
