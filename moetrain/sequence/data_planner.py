"""Plans without estimates: every sequence takes one rank, or all take gangs of one size."""

from collections.abc import Sequence as Series

import numpy as np

from moetrain.config.errors import require, require_at_least
from moetrain.sequence.plan import Ints, Sequence, SequencePlan


def plan_data(
    sequences: Series[Sequence] | Ints, num_ranks: int, micro_batch: int, *, gang: int = 1, block: int = 1
) -> SequencePlan:
    """Deal the global batch out in order, one sequence per gang in turn, ``micro_batch`` of them per round.

    Of W / d gangs of d ranks, gang g is the ranks [g d, (g + 1) d). Sequence i goes to gang i mod W / d, so gangs
    differ by at most one sequence; round k covers the sequences [k m W / d, (k + 1) m W / d) of the batch. Where the
    batch does not divide, the last lanes hold fewer or none. All ranks run the same number of rounds.

    Args:
        sequences: the step's global batch, or int64 [N, 3] of id, tokens and loss tokens; may be shorter than W.
        num_ranks: W, the ranks of the data group; items name ranks by their index in it.
        micro_batch: m, the most sequences of one gang and round.
        gang: d, ranks that share each sequence; context parallelism of one size.
        block: neighbouring ranks that share all-to-alls.

    >>> [i.sequence_ids for i in plan_data([Sequence(j, 8, 8) for j in range(5)], 2, 2).all_items()]
    [(0, 2), (1, 3), (4,)]
    """
    require_at_least("plan_data: num_ranks", num_ranks, 1)
    require_at_least("plan_data: micro_batch", micro_batch, 1)
    require(
        gang >= 1 and num_ranks % gang == 0,
        f"plan_data: gang must divide the {num_ranks} ranks, got {gang}; choose a divisor",
    )
    table_N3 = sequences if isinstance(sequences, np.ndarray) else _table(sequences)
    num_gangs, num_sequences = num_ranks // gang, len(table_N3)
    row_N = np.arange(num_sequences)
    round_N, gang_N = row_N // (num_gangs * micro_batch), row_N % num_gangs
    member_N = np.lexsort((row_N, gang_N, round_N)).astype(np.int32)
    lane_N = (round_N * num_gangs + gang_N)[member_N]
    begin_I = np.flatnonzero(np.diff(lane_N, prepend=-1))
    lane_I = lane_N[begin_I]
    num_items = len(begin_I)
    offset_I1 = np.append(begin_I, num_sequences)
    size_I = np.diff(offset_I1)
    num_tokens_N = table_N3[member_N, 1]
    # The first rank of a gang has the first part, which is rounded down, and the last one, which is rounded up.
    cut_N = num_tokens_N if gang == 1 else _most_of_a_rank(num_tokens_N, gang)
    held_I = np.add.reduceat(cut_N, begin_I) if num_items else np.zeros(0, np.int64)
    rounds = -(-num_sequences // (num_gangs * micro_batch))
    assert int(size_I.sum()) == num_sequences
    return SequencePlan(
        sequence_N3=np.ascontiguousarray(table_N3, np.int64),
        round_I=(lane_I // num_gangs).astype(np.int32),
        offset_I1=offset_I1.astype(np.int64),
        member_N=member_N,
        rank_offset_I1=gang * np.arange(num_items + 1, dtype=np.int64),
        rank_M=(gang * (lane_I % num_gangs)[:, None] + np.arange(gang)).astype(np.int32).flatten(),
        offload_I=np.zeros(num_items),
        est_ms_I=np.zeros(num_items),
        rounds_R=np.full(num_ranks, rounds, np.int32),
        block=block,
        capacity=int(held_I.max(initial=0)),
    )


def _most_of_a_rank(num_tokens_N: Ints, gang: int) -> Ints:
    """At most so many tokens of each sequence are on one rank of its gang."""
    cut_NP = np.arange(2 * gang + 1) * num_tokens_N[:, None] // (2 * gang)
    part_NP = np.diff(cut_NP, axis=1)
    most_N: Ints = (part_NP + part_NP[:, ::-1]).max(axis=1)
    return most_N


def _table(sequences: Series[Sequence]) -> Ints:
    rows = [(sequence.id, sequence.num_tokens, sequence.num_loss_tokens) for sequence in sequences]
    return np.array(rows, np.int64).reshape(-1, 3)
