import random
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.sequence import HEADER_LENGTH, Item, Sequence, SequencePlan


def gang_plan() -> SequencePlan:
    # Sequence 7 spans ranks 0-2 in round 0, rank 3 has a pack of two beside it; round 1 has one item and empty lanes.
    return SequencePlan.build(
        [Sequence(7, 24, 23), Sequence(3, 4, 4), Sequence(9, 3, 0), Sequence(1, 8, 8)],
        [Item(5, 1, (1,), (2,), 0.5, 1.25), Item(2, 0, (7,), (0, 1, 2), 0.0, 3.5), Item(4, 0, (3, 9), (3,))],
        num_ranks=5,
        num_rounds=2,
        capacity=8,
        lower_bound_ms=4.0,
        est_makespan_ms=4.75,
    )


def test_build_derives_totals_and_lanes() -> None:
    plan = gang_plan()
    assert [item.gid for item in plan.items] == [2, 4, 5]
    assert plan.rank_gids == ((2,), (2,), (2, 5), (4,), ())
    assert (plan.num_ranks, plan.num_tokens, plan.num_loss_tokens) == (5, 39, 35)
    assert [item.gid for item in plan.items_of(2)] == [2, 5]
    assert plan.items_of(4) == ()
    assert plan.item_at(2, 1) == Item(5, 1, (1,), (2,), 0.5, 1.25)
    assert plan.item_at(3, 1) is None


def test_zigzag_padding_counts_towards_capacity() -> None:
    item = Item(0, 0, (0,), (0, 1, 2))
    assert [item.rank_tokens(n) for n in (1, 6, 7, 24, 25)] == [2, 2, 4, 8, 10]
    assert Item(0, 0, (0,), (4,)).rank_tokens(25) == 25
    with pytest.raises(ValueError, match="item 0 puts 10 tokens on each of 3 ranks, capacity is 9"):
        SequencePlan.build([Sequence(0, 25, 25)], [item], num_ranks=3, num_rounds=1, capacity=9)
    SequencePlan.build([Sequence(0, 25, 25)], [item], num_ranks=3, num_rounds=1, capacity=10)


def test_arrays_round_trip_and_hash() -> None:
    plan = gang_plan()
    header, body = plan.to_arrays()
    assert header.dtype == body.dtype == np.int64
    assert header.shape == (HEADER_LENGTH,)
    assert header[-1] == body.size
    again = SequencePlan.from_arrays(header, body)
    assert again == plan
    assert again.content_hash() == plan.content_hash()


def test_hash_sees_every_part() -> None:
    plan = gang_plan()
    first, middle, last = plan.items
    others = [
        replace(plan, items=(replace(first, est_ms=3.25), middle, last)),
        replace(plan, items=(replace(first, offload_ratio=0.25), middle, last)),
        replace(plan, items=(first, replace(middle, sequence_ids=(9, 3)), last)),
        replace(plan, capacity=9),
        replace(plan, num_rounds=3),
        replace(plan, est_makespan_ms=5.0),
        replace(plan, sequences=plan.sequences[::-1]),
    ]
    assert len({plan.content_hash(), *(other.content_hash() for other in others)}) == len(others) + 1


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    header, body = gang_plan().to_arrays()
    with pytest.raises(ValueError, match="do not belong together; broadcast both arrays"):
        SequencePlan.from_arrays(header, body[:-1])
    changed = header.copy()
    changed[0] += 1
    with pytest.raises(ValueError, match="do not belong together"):
        SequencePlan.from_arrays(changed, body)
    dropped = body.copy()
    dropped[1] += 1  # one token more than the item's ranks can hold
    with pytest.raises(ValueError, match="capacity is 8"):
        SequencePlan.from_arrays(header, dropped)


def test_plan_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        gang_plan().num_rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 38}, "num_tokens must be the sequences' sum 39, got 38"),
        ({"num_loss_tokens": 0}, "num_loss_tokens must be the sequences' sum 35, got 0"),
        ({"rank_gids": ((2,), (2,), (2, 5), (), ())}, r"rank 3 lists gids \[\], but its items are \[4\]"),
        ({"rank_gids": ((2,), (2,), (5, 2), (4,), ())}, r"rank 2 lists gids \[5, 2\], but its items are \[2, 5\]"),
        ({"rank_gids": ((2,), (2,), (2, 5))}, "item 4 names rank 3 of 3"),
        ({"rank_gids": ()}, "at least one rank"),
        ({"num_rounds": 1}, r"item 5: round must be in \[0, 1\), got 1"),
        ({"num_rounds": -1}, "num_rounds must be at least 0"),
        ({"capacity": 7}, "item 2 puts 8 tokens on each of 3 ranks, capacity is 7"),
    ],
)
def test_broken_plans_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(gang_plan(), **change)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([Item(0, 0, (0,), (0,))], "sequence 1 is in no item"),
        ([Item(0, 0, (0,), (0,)), Item(1, 0, (0, 1), (1,))], "sequence 0 is planned twice"),
        ([Item(0, 0, (0, 1, 2), (0,))], "sequence 2 is planned but not in the batch"),
        ([Item(0, 0, (0,), (0,)), Item(0, 1, (1,), (0,))], "items must ascend by distinct gid"),
        ([Item(0, 1, (0,), (0,)), Item(1, 0, (1,), (0,))], "rank 0: item 1 of round 0 comes after round 1"),
        ([Item(0, 0, (0,), (0,)), Item(1, 0, (1,), (0,))], "rank 0: item 1 of round 0 comes after round 0"),
        ([Item(0, 0, (0,), (0,)), Item(1, 2, (1,), (0,))], r"item 1: round must be in \[0, 2\), got 2"),
        ([Item(0, 0, (0, 1), (0, 2))], "item 0 names rank 2 of 2"),
    ],
)
def test_broken_items_are_refused(items: list[Item], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequencePlan.build([Sequence(0, 2, 2), Sequence(1, 2, 2)], items, num_ranks=2, num_rounds=2, capacity=4)


def test_repeated_sequence_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence ids must be distinct, got 4 twice"):
        SequencePlan.build([Sequence(4, 1, 1)] * 2, [], num_ranks=1, num_rounds=0, capacity=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sequence(1, 0, 0), "num_tokens must be at least 1, got 0"),
        (lambda: Sequence(1, 3, 4), r"num_loss_tokens must be between 0 and num_tokens \(3\), got 4"),
        (lambda: Item(1, 0, (), (0,)), "Item 1 must have sequences and ranks"),
        (lambda: Item(1, 0, (0,), ()), "Item 1 must have sequences and ranks"),
        (lambda: Item(1, 0, (0,), (1, 1)), "ranks must be distinct, ascending"),
        (lambda: Item(1, 0, (0,), (-1, 1)), "ranks must be distinct, ascending"),
        (lambda: Item(1, 0, (0,), (0,), 1.5), "offload_ratio must be between 0 and 1, got 1.5"),
    ],
)
def test_broken_parts_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_questions_outside_the_plan_are_refused() -> None:
    plan = gang_plan()
    with pytest.raises(ValueError, match=r"rank must be in \[0, 5\), got 5"):
        plan.items_of(5)
    with pytest.raises(ValueError, match=r"round must be in \[0, 2\), got 2"):
        plan.item_at(0, 2)


def test_an_empty_step_is_a_plan() -> None:
    plan = SequencePlan.build([], [], num_ranks=3, num_rounds=0, capacity=0)
    assert plan.rank_gids == ((), (), ())
    assert SequencePlan.from_arrays(*plan.to_arrays()) == plan


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.randoms(use_true_random=False))
def test_random_gang_plans_round_trip(num_ranks: int, num_rounds: int, rng: random.Random) -> None:
    sequences: list[Sequence] = []
    items: list[Item] = []
    for round_idx in range(num_rounds):
        lanes = [rank for rank in range(num_ranks) if rng.random() < 0.8]
        while lanes:
            width = rng.randint(1, len(lanes))
            ranks, lanes = tuple(lanes[:width]), lanes[width:]
            size = rng.randint(1, 50)
            sequences.append(Sequence(len(sequences) + 1000, size, rng.randint(0, size)))
            items.append(Item(3 * len(items), round_idx, (sequences[-1].id,), ranks, rng.random(), rng.random() * 9))
    plan = SequencePlan.build(sequences, items, num_ranks=num_ranks, num_rounds=num_rounds, capacity=50)
    assert SequencePlan.from_arrays(*plan.to_arrays()) == plan
    assert sum(len(gids) for gids in plan.rank_gids) == sum(len(item.ranks) for item in items)
    if items:
        lost = items[:-1]
        with pytest.raises(ValueError, match="is in no item"):
            SequencePlan.build(sequences, lost, num_ranks=num_ranks, num_rounds=num_rounds, capacity=50)
