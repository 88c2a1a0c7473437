"""Plans of a step: what they say of a rank, what travels, and which rules they must keep."""

import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.sequence import Item, Sequence, SequencePlan
from moetrain.sequence.plan import HEADER_LENGTH
from moetrain.sequence.zigzag import Zigzag

SEQUENCES = [Sequence(7, 24, 23), Sequence(3, 4, 4), Sequence(9, 3, 0), Sequence(1, 8, 8)]
# Sequence 7 spans ranks 0 to 2 in round 0, rank 3 has a pack of two beside it; round 1 has one item and empty lanes.
ITEMS = [
    Item(0, 0, (7,), (0, 1, 2), 0.0, 3.5),
    Item(1, 0, (3, 9), (3,)),
    Item(2, 1, (1,), (2,), 0.5, 1.25),
]


def gang_plan(**changes: Any) -> SequencePlan:
    given: dict[str, Any] = {"sequences": SEQUENCES, "items": ITEMS, "num_ranks": 5, "capacity": 8, "num_layers": 6}
    plan = SequencePlan.of_items(**{**given, **changes})
    return replace(plan, lower_bound_ms=4.0, est_makespan_ms=4.75)


def test_lanes_and_totals() -> None:
    plan = gang_plan()
    assert (plan.num_ranks, plan.num_items, plan.num_tokens, plan.num_loss_tokens) == (5, 3, 39, 35)
    assert plan.all_items() == tuple(ITEMS)
    assert plan.items_of(2) == (ITEMS[0], ITEMS[2])
    assert plan.items_of(4) == ()
    assert plan.item_at(2, 1) == ITEMS[2]
    assert plan.item_at(3, 1) is None
    assert plan.sequences_of(ITEMS[1]) == (SEQUENCES[1], SEQUENCES[2])
    assert [plan.num_rounds(rank) for rank in range(5)] == [2] * 5
    assert plan.num_tokens_of_ranks().tolist() == [8, 8, 16, 7, 0]


def test_a_gang_holds_parts_without_padding() -> None:
    sizes = [Zigzag([25], 3).size(rank) for rank in range(3)]
    assert sizes == [9, 8, 8]
    gang: dict[str, Any] = {"sequences": [Sequence(0, 25, 25)], "items": [Item(0, 0, (0,), (0, 1, 2))], "num_ranks": 3}
    assert SequencePlan.of_items(**gang, capacity=9).num_tokens_of_ranks().tolist() == sizes
    with pytest.raises(ValueError, match=r"item 0 gives rank 0 9 tokens.*; the capacity is 8"):
        SequencePlan.of_items(**gang, capacity=8)


def test_what_waits_on_the_host_takes_no_room() -> None:
    """Of 6 layers' activations 4 may wait: 24 tokens take the room of 8, or of 16 at half the ratio."""
    whole: dict[str, Any] = {"sequences": [Sequence(0, 24, 24)], "num_ranks": 1, "num_layers": 6}
    for ratio, room in ((1.0, 8), (0.5, 16), (0.0, 24)):
        SequencePlan.of_items(items=[Item(0, 0, (0,), (0,), ratio)], capacity=room, **whole)
        with pytest.raises(ValueError, match=f"the capacity is {room - 1}"):
            SequencePlan.of_items(items=[Item(0, 0, (0,), (0,), ratio)], capacity=room - 1, **whole)
    with pytest.raises(ValueError, match="the capacity is 23"):  # two layers are never on the host
        SequencePlan.of_items(items=[Item(0, 0, (0,), (0,), 1.0)], capacity=23, **{**whole, "num_layers": 2})


def test_arrays_round_trip_and_hash() -> None:
    plan = gang_plan()
    header, content = plan.to_arrays()
    assert (str(header.dtype), header.shape, str(content.dtype)) == ("int64", (HEADER_LENGTH,), "uint8")
    assert SequencePlan.size_of_content(header) == len(content)
    again = SequencePlan.from_arrays(header, content)
    assert again.content_hash() == plan.content_hash()
    assert again.all_items() == plan.all_items()
    assert (again.lower_bound_ms, again.est_makespan_ms) == (4.0, 4.75)
    assert (again.block, again.capacity, again.num_layers) == (1, 8, 6)


def test_the_hash_sees_every_part() -> None:
    plan = gang_plan()
    swapped = [SEQUENCES[0], SEQUENCES[2], SEQUENCES[1], SEQUENCES[3]]
    others = [
        gang_plan(items=[replace(ITEMS[0], est_ms=3.25), *ITEMS[1:]]),
        gang_plan(items=[replace(ITEMS[0], offload_ratio=0.25), *ITEMS[1:]]),
        gang_plan(items=[ITEMS[0], replace(ITEMS[1], sequence_ids=(9, 3)), ITEMS[2]]),
        gang_plan(items=[ITEMS[0], replace(ITEMS[1], ranks=(4,)), ITEMS[2]]),
        gang_plan(items=[ITEMS[0], replace(ITEMS[1], round=1), ITEMS[2]]),
        gang_plan(sequences=swapped),
        gang_plan(capacity=9),
        gang_plan(num_layers=7),
        gang_plan(block=5),
        gang_plan(rounds=[3] * 5),
        replace(plan, est_makespan_ms=5.0),
        replace(plan, lower_bound_ms=5.0),
    ]
    assert len({plan.content_hash(), *(other.content_hash() for other in others)}) == len(others) + 1


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    header, content = gang_plan().to_arrays()
    with pytest.raises(ValueError, match=rf"the header announces {len(content)} bytes, got {len(content) - 1}"):
        SequencePlan.from_arrays(header, content[:-1])
    old = header.copy()
    old[0] = 1
    with pytest.raises(ValueError, match="give all ranks one version of moetrain"):
        SequencePlan.from_arrays(old, content)
    smaller = header.copy()
    smaller[6] -= 1
    with pytest.raises(ValueError, match="the capacity is 7"):
        SequencePlan.from_arrays(smaller, content)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        gang_plan().capacity = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([Item(0, 0, (0,), (0,))], "sequence 1 is in no item"),
        ([Item(0, 0, (0,), (0,)), Item(1, 0, (0, 1), (1,))], "sequence 0 is planned twice"),
        ([Item(0, 0, (0, 1, 2), (0,))], "sequence 2 is planned but not in the batch"),
        ([Item(0, 1, (0,), (0,)), Item(1, 0, (1,), (0,))], "rank 0: item 1 of round 0 comes after round 1"),
        ([Item(0, 0, (0,), (0,)), Item(1, 0, (1,), (0,))], "rank 0: item 1 of round 0 comes after round 0"),
        ([Item(0, -1, (0, 1), (0,))], r"rank 0 must run at least 1 rounds, got 0"),
        ([Item(0, 0, (0, 1), (0, 2))], "item 0 names rank 2 of 2"),
        ([Item(0, 0, (0, 1), (1, 1))], "item 0: ranks must be distinct, ascending and >= 0, got 1 after 1"),
        ([Item(0, 0, (0, 1), (-1, 1))], "item 0: ranks must be distinct, ascending and >= 0, got -1 after -1"),
        ([Item(0, 0, (0, 1), (0,)), Item(1, 0, (), (1,))], "item 1 must have sequences and ranks"),
        ([Item(0, 0, (0, 1), ())], "item 0 must have sequences and ranks"),
        ([Item(0, 0, (0, 1), (0,), 1.5)], "item 0: the offload ratio must be between 0 and 1, got 1.5"),
        ([Item(0, 0, (0, 1), (0,), 0.0, float("nan"))], "item 0: its time must be finite and at least 0"),
    ],
)
def test_broken_items_are_refused(items: list[Item], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequencePlan.of_items([Sequence(0, 2, 2), Sequence(1, 2, 2)], items, num_ranks=2, capacity=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": [2, 2, 2, 2, 1], "block": 5}, "rank 4 runs 1 and rank 0 of its block 2"),
        ({"rounds": [1, 2, 2, 1, 1]}, "item 0 joins blocks that run 1 and 2 rounds"),
        ({"rounds": [2, 2, 2, 1, 0]}, "rank 4 must run at least 1 rounds, got 0"),
        ({"rounds": [1] * 5}, r"item 2: its round must be in \[0, 1\), got 1"),
        ({"block": 2}, "block must divide the ranks, 5, got 2"),
        ({"block": 0}, "block must divide the ranks, 5, got 0"),
        ({"capacity": 7}, "item 0 gives rank 0 8 tokens"),
        ({"sequences": [*SEQUENCES[:3], Sequence(1, 0, 0)]}, "sequence 1 must have at least 1 token, got 0"),
        ({"sequences": [*SEQUENCES[:3], Sequence(1, 3, 4)]}, "sequence 1: loss tokens must be between 0 and its 3"),
    ],
)
def test_broken_plans_are_refused(change: dict[str, Any], message: str) -> None:
    gang_plan(rounds=[2, 2, 2, 1, 1])  # blocks that no gang joins have their own
    with pytest.raises(ValueError, match=message):
        gang_plan(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: {"member_N": plan.member_N[::-1] * 0}, "sequence 7 is planned twice"),
        (lambda plan: {"member_N": plan.member_N + 1}, "member 3 must be one of the 4 sequences, got 4"),
        (lambda plan: {"member_N": plan.member_N[:3]}, r"member must be \[N\]"),
        (lambda plan: {"offset_I1": plan.offset_I1 + 1}, "offset must go from 0 to 4, got 1 to 5"),
        (lambda plan: {"rank_offset_I1": plan.rank_offset_I1[:-1]}, r"rank_offset must be \[I \+ 1\]"),
        (lambda plan: {"sequence_N3": plan.sequence_N3[:, :2]}, r"sequence must be \[N, 3\]"),
        (lambda plan: {"sequence_N3": plan.sequence_N3 // 100}, "must have at least 1 token"),
        (
            lambda plan: {"sequence_N3": plan.sequence_N3 * [0, 1, 1] + [4, 0, 0]},
            "sequence ids must be distinct, got 4 twice",
        ),
        (lambda plan: {"rounds_R": plan.rounds_R[:0]}, "there must be at least one rank"),
    ],
)
def test_broken_arrays_are_refused(change: Callable[[SequencePlan], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(gang_plan(), **change(gang_plan()))
    with pytest.raises(TypeError, match="SequencePlan: round must be Int"):
        replace(gang_plan(), round_I=gang_plan().round_I.astype(np.int64))


def test_questions_outside_the_plan_are_refused() -> None:
    plan = gang_plan()
    with pytest.raises(ValueError, match=r"rank must be in \[0, 5\), got 5"):
        plan.items_of(5)
    with pytest.raises(ValueError, match=r"round must be in \[0, 2\), which rank 0 runs, got 2"):
        plan.item_at(0, 2)


def test_an_empty_step_is_a_plan() -> None:
    for rounds in (None, [1, 1, 1]):
        plan = SequencePlan.of_items([], [], num_ranks=3, capacity=0, rounds=rounds)
        assert (plan.all_items(), plan.num_tokens, plan.num_rounds(2)) == ((), 0, 0 if rounds is None else 1)
        assert SequencePlan.from_arrays(*plan.to_arrays()).content_hash() == plan.content_hash()
        assert plan.num_tokens_of_ranks().tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.randoms(use_true_random=False))
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
            items.append(Item(len(items), round_idx, (sequences[-1].id,), ranks, rng.random(), rng.random() * 9))
    plan = SequencePlan.of_items(sequences, items, num_ranks=num_ranks, capacity=50, rounds=[num_rounds] * num_ranks)
    assert SequencePlan.from_arrays(*plan.to_arrays()).content_hash() == plan.content_hash()
    assert plan.all_items() == tuple(items)
    held = [0] * num_ranks
    for item in items:
        parts = Zigzag([sequence.num_tokens for sequence in plan.sequences_of(item)], len(item.ranks))
        for place, rank in enumerate(item.ranks):
            held[rank] += parts.size(place)
    assert plan.num_tokens_of_ranks().tolist() == held
    for rank in range(num_ranks):
        assert plan.items_of(rank) == tuple(item for item in items if rank in item.ranks)
    if items:
        with pytest.raises(ValueError, match="is in no item"):
            SequencePlan.of_items(sequences, items[:-1], num_ranks=num_ranks, capacity=50)
