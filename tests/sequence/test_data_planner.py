import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import NotBuiltYetError
from moetrain.sequence import Sequence, plan_data, plan_sequences


def batch(size: int) -> list[Sequence]:
    return [Sequence(100 + i, 8, 7) for i in range(size)]


def test_rounds_cover_the_batch_in_order() -> None:
    plan = plan_data(batch(10), num_ranks=3, micro_batch=2)
    lanes = [[(i.round, i.sequence_ids) for i in plan.items_of(rank)] for rank in range(3)]
    assert lanes == [
        [(0, (100, 103)), (1, (106, 109))],
        [(0, (101, 104)), (1, (107,))],
        [(0, (102, 105)), (1, (108,))],
    ]
    assert (plan.num_rounds, plan.num_tokens, plan.num_loss_tokens, plan.capacity) == (2, 80, 70, 16)


def test_more_ranks_than_rows_leaves_empty_lanes() -> None:
    plan = plan_data(batch(2), num_ranks=4, micro_batch=3)
    assert plan.num_rounds == 1
    assert [len(plan.items_of(rank)) for rank in range(4)] == [1, 1, 0, 0]
    assert plan.item_at(3, 0) is None


def test_no_sequences() -> None:
    plan = plan_data([], num_ranks=2, micro_batch=1)
    assert (plan.num_rounds, plan.items, plan.num_tokens) == (0, (), 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 5))
def test_every_sequence_once_and_ranks_balanced(size: int, num_ranks: int, micro_batch: int) -> None:
    sequences = batch(size)
    plan = plan_data(sequences, num_ranks, micro_batch)
    loads = [sum(len(i.sequence_ids) for i in plan.items_of(rank)) for rank in range(num_ranks)]
    assert sum(loads) == size
    assert max(loads) - min(loads) <= 1
    assert plan.num_rounds == -(-max(loads) // micro_batch)
    in_rounds: list[list[int]] = [[] for _ in range(plan.num_rounds)]
    for item in plan.items:
        assert len(item.ranks) == 1
        assert len(item.sequence_ids) <= micro_batch
        in_rounds[item.round].extend(item.sequence_ids)
    assert [x for ids in in_rounds for x in sorted(ids)] == [s.id for s in sequences]
    assert plan == plan_data(list(sequences), num_ranks, micro_batch)


def test_planners_by_name() -> None:
    assert plan_sequences(batch(3), 2, 1) == plan_data(batch(3), 2, 1)
    with pytest.raises(NotBuiltYetError, match="planner = 'hdp' is not built yet"):
        plan_sequences(batch(3), 2, 1, planner="hdp")
    with pytest.raises(ValueError, match="planner must be one of 'data', 'hdp', got 'dat'; did you mean 'data'"):
        plan_sequences(batch(3), 2, 1, planner="dat")


@pytest.mark.parametrize(("num_ranks", "micro_batch", "field"), [(0, 1, "num_ranks"), (1, 0, "micro_batch")])
def test_sizes_below_one_are_refused(num_ranks: int, micro_batch: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"plan_data: {field} must be at least 1, got 0"):
        plan_data(batch(1), num_ranks, micro_batch)
