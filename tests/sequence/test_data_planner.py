"""Plans in which all sequences have as many ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.sequence import Sequence, plan_data
from moetrain.sequence.zigzag import Zigzag


def batch(size: int) -> list[Sequence]:
    return [Sequence(100 + i, 8 + i % 3, 7) for i in range(size)]


def test_rounds_cover_the_batch_in_order() -> None:
    plan = plan_data([Sequence(100 + i, 8, 7) for i in range(10)], num_ranks=3, micro_batch=2)
    lanes = [[(i.round, i.sequence_ids) for i in plan.items_of(rank)] for rank in range(3)]
    assert lanes == [
        [(0, (100, 103)), (1, (106, 109))],
        [(0, (101, 104)), (1, (107,))],
        [(0, (102, 105)), (1, (108,))],
    ]
    assert (plan.num_rounds(0), plan.num_tokens, plan.num_loss_tokens, plan.capacity) == (2, 80, 70, 16)


def test_gangs_of_one_size_take_turns() -> None:
    plan = plan_data(batch(5), num_ranks=4, micro_batch=1, gang=2, block=4)
    assert [(item.round, item.sequence_ids, item.ranks) for item in plan.all_items()] == [
        (0, (100,), (0, 1)),
        (0, (101,), (2, 3)),
        (1, (102,), (0, 1)),
        (1, (103,), (2, 3)),
        (2, (104,), (0, 1)),
    ]
    assert (plan.num_rounds(3), plan.block, plan.capacity) == (3, 4, 5)
    with pytest.raises(ValueError, match="plan_data: gang must divide the 4 ranks, got 3"):
        plan_data(batch(5), num_ranks=4, micro_batch=1, gang=3)


def test_more_ranks_than_rows_leaves_empty_lanes() -> None:
    plan = plan_data(batch(2), num_ranks=4, micro_batch=3)
    assert plan.num_rounds(3) == 1
    assert [len(plan.items_of(rank)) for rank in range(4)] == [1, 1, 0, 0]
    assert plan.item_at(3, 0) is None


def test_no_sequences() -> None:
    plan = plan_data([], num_ranks=2, micro_batch=1)
    assert (plan.num_rounds(0), plan.num_items, plan.num_tokens, plan.capacity) == (0, 0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4))
def test_every_sequence_once_and_gangs_balanced(size: int, num_gangs: int, micro_batch: int, gang: int) -> None:
    sequences, num_ranks = batch(size), num_gangs * gang
    plan = plan_data(sequences, num_ranks, micro_batch, gang=gang)
    loads = [sum(len(i.sequence_ids) for i in plan.items_of(rank)) for rank in range(num_ranks)]
    assert sum(loads) == size * gang
    assert max(loads) - min(loads) <= 1
    assert plan.num_rounds(0) == -(-max(loads) // micro_batch)
    in_rounds: list[list[int]] = [[] for _ in range(plan.num_rounds(0))]
    held = [0]
    for item in plan.all_items():
        assert len(item.ranks) == gang
        assert len(item.sequence_ids) <= micro_batch
        in_rounds[item.round].extend(item.sequence_ids)
        parts = Zigzag([sequence.num_tokens for sequence in plan.sequences_of(item)], gang)
        held += [parts.size(place) for place in range(gang)]
    assert [x for ids in in_rounds for x in sorted(ids)] == [s.id for s in sequences]
    assert max(held) <= plan.capacity <= max(held) + 2 * micro_batch
    table_N3 = np.array([(s.id, s.num_tokens, s.num_loss_tokens) for s in sequences], np.int64).reshape(-1, 3)
    again = plan_data(table_N3, num_ranks, micro_batch, gang=gang)
    assert again.content_hash() == plan.content_hash()


@pytest.mark.parametrize(("num_ranks", "micro_batch", "field"), [(0, 1, "num_ranks"), (1, 0, "micro_batch")])
def test_sizes_below_one_are_refused(num_ranks: int, micro_batch: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"plan_data: {field} must be at least 1, got 0"):
        plan_data(batch(1), num_ranks, micro_batch)
