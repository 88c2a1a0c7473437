"""Plain data parallelism: every sequence takes one rank, and all ranks run the same number of rounds."""

from collections.abc import Sequence as Series

from moetrain.config.errors import NotBuiltYetError, require_at_least, require_one_of
from moetrain.sequence.plan import Item, Sequence, SequencePlan


def plan_data(sequences: Series[Sequence], num_ranks: int, micro_batch: int) -> SequencePlan:
    """Deal the global batch out in order, one sequence per rank in turn, ``micro_batch`` of them per round.

    Sequence i goes to rank i mod W, so ranks differ by at most one sequence; round k covers the sequences
    [k·W·m, (k + 1)·W·m) of the batch. Where the batch does not divide, the last lanes hold fewer or none.

    Args:
        sequences: the step's global batch; may be shorter than the number of ranks.
        num_ranks: W, the ranks of the data group; items name ranks by their index in it.
        micro_batch: m, the most sequences of one rank and round.

    >>> [i.sequence_ids for i in plan_data([Sequence(j, 8, 8) for j in range(5)], 2, 2).items]
    [(0, 2), (1, 3), (4,)]
    """
    require_at_least("plan_data: num_ranks", num_ranks, 1)
    require_at_least("plan_data: micro_batch", micro_batch, 1)
    round_size = num_ranks * micro_batch
    num_rounds = -(-len(sequences) // round_size)
    items: list[Item] = []
    for round_idx in range(num_rounds):
        dealt = [sequence.id for sequence in sequences[round_idx * round_size : (round_idx + 1) * round_size]]
        for rank in range(min(num_ranks, len(dealt))):
            items.append(Item(len(items), round_idx, tuple(dealt[rank::num_ranks]), (rank,)))
    return SequencePlan.build(
        sequences,
        items,
        num_ranks=num_ranks,
        num_rounds=num_rounds,
        capacity=micro_batch * max((sequence.num_tokens for sequence in sequences), default=0),
    )


def plan_sequences(
    sequences: Series[Sequence], num_ranks: int, micro_batch: int, *, planner: str = "data"
) -> SequencePlan:
    """Plan a step with the planner of that name.

    Raises:
        NotBuiltYetError: for ``"hdp"``, where a sequence takes as many ranks as it needs (ByteScale, 2502.21231).
    """
    require_one_of("planner", planner, ("data", "hdp"))
    if planner == "hdp":
        raise NotBuiltYetError("planner", planner, "use 'data', one rank per sequence")
    return plan_data(sequences, num_ranks, micro_batch)
