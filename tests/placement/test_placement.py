import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement.placements import random_placement, replicated_everywhere

from moetrain.config import NotBuiltYetError
from moetrain.placement.placement import Placement, one_holder_quotas

SMALL = Placement(
    num_ranks=3,
    owners=((0, 1), (1, 1)),
    holders=((0, 1), (1, 2)),
    quotas=(((1, 0), (1, 0)), ((0, 1), (1, 0)), ((3, 1), (0, 2))),
)


def test_questions_have_the_answers_of_the_table() -> None:
    assert SMALL.num_experts == 2
    assert [SMALL.num_slices(expert) for expert in (0, 1)] == [2, 2]
    assert [SMALL.experts_of(rank) for rank in range(3)] == [(0,), (0, 1), (1,)]
    assert [SMALL.owned_by(rank) for rank in range(3)] == [((0, 0),), ((0, 1), (1, 0), (1, 1)), ()]
    assert [SMALL.destination(source, 0) for source in (0, 1)] == [0, 1]
    assert [SMALL.destination(source, 1) for source in range(3)] == [1, 1, 2]


def test_tokens_split_among_holders_are_not_built_yet() -> None:
    with pytest.raises(NotBuiltYetError, match=r"quotas\[2\]\[0\] = \(3, 1\) is not built yet.*one holder of expert 0"):
        SMALL.destination(2, 0)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 7), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_owners_and_holders_are_found_from_either_side(seed: int, ranks: int, experts: int, slices: int) -> None:
    placement = random_placement(seed, ranks, experts, slices)
    owned = [(chunk, rank) for rank in range(ranks) for chunk in placement.owned_by(rank)]
    assert len(owned) == experts * slices
    assert all(placement.owners[expert][slice_idx] == rank for (expert, slice_idx), rank in owned)
    held = {(expert, rank) for rank in range(ranks) for expert in placement.experts_of(rank)}
    assert held == {(expert, rank) for expert, holders in enumerate(placement.holders) for rank in holders}
    for source in range(ranks):
        for expert in range(experts):
            assert placement.destination(source, expert) in placement.holders[expert]


def test_hashes_are_equal_exactly_where_placements_are() -> None:
    twin = dataclasses.replace(SMALL)
    others = [
        dataclasses.replace(SMALL, owners=((0, 0), (1, 1))),
        dataclasses.replace(SMALL, holders=((0, 2), (1, 2))),
        dataclasses.replace(SMALL, quotas=(SMALL.quotas[1], *SMALL.quotas[1:])),
    ]
    assert twin == SMALL
    assert twin.content_hash() == SMALL.content_hash()
    assert len({placement.content_hash() for placement in (SMALL, *others)}) == 4


def test_the_hash_is_the_same_in_another_process() -> None:
    code = f"from moetrain.placement.placement import Placement; print({SMALL!r}.content_hash())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == SMALL.content_hash()


def test_replicated_everywhere_keeps_owners_and_serves_itself() -> None:
    everywhere = replicated_everywhere(SMALL)
    assert everywhere.owners == SMALL.owners
    for rank in range(3):
        assert everywhere.experts_of(rank) == (0, 1)
        assert [everywhere.destination(rank, expert) for expert in (0, 1)] == [rank, rank]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_ranks": 0}, r"placement\.num_ranks must be at least 1, got 0"),
        ({"owners": ()}, r"must name at least one expert, got none"),
        ({"owners": ((0, 1), ())}, r"owners\[1\] must have at least one slice, got none"),
        ({"owners": ((0, 3), (1, 1))}, r"owners\[0\] must be pool ranks below 3, got 3; the pool has 3 ranks"),
        ({"holders": ((0, 1),)}, r"holders must have one entry per expert \(2\), got 1"),
        ({"holders": ((1, 0), (1, 2))}, r"holders\[0\] must be ascending ranks.*got \(1, 0\); sort them"),
        ({"holders": ((0, 1), ())}, r"holders\[1\] must be ascending ranks, at least one"),
        ({"holders": ((-1, 1), (1, 2))}, r"holders\[0\] must be pool ranks below 3, got -1"),
        ({"quotas": SMALL.quotas[:2]}, r"quotas must have one row per source rank \(3\), got 2"),
        (
            {"quotas": (SMALL.quotas[0][:1], *SMALL.quotas[1:])},
            r"quotas\[0\] must have one entry per expert \(2\), got 1",
        ),
        ({"quotas": (((0, 0), (1, 0)), *SMALL.quotas[1:])}, r"quotas\[0\]\[0\] must have a non-negative share"),
        (
            {"quotas": (((1, 0), (2, -1)), *SMALL.quotas[1:])},
            r"each of the 2 holders and a positive sum, got \(2, -1\)",
        ),
        (
            {"quotas": (((1,), (1, 0)), *SMALL.quotas[1:])},
            r"quotas\[0\]\[0\] must have .* got \(1,\); give some holder",
        ),
    ],
)
def test_errors_name_the_entry(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SMALL, **change)


class Looked(tuple[Any, ...]):
    """Shares that know how often they were gone through."""

    times = 0

    def __iter__(self) -> Iterator[int]:
        type(self).times += 1
        return super().__iter__()


def test_shares_in_common_are_checked_once_for_each_number_of_holders() -> None:
    """A large pool has as many entries as sources times experts times holders, nearly all of them the same objects."""
    shares = Looked((0, 1))
    looks = []
    for count in (1, 20):
        Looked.times = 0
        Placement(2, ((0,),) * count, ((0, 1),) * count, ((shares,) * count, (shares,) * count))
        looks.append(Looked.times)
    assert looks[0] == looks[1] > 0
    row = (shares, shares)
    with pytest.raises(ValueError, match=r"quotas\[1\]\[1\] must have a non-negative share for each of the 1 holders"):
        Placement(2, ((0,), (1,)), ((0, 1), (1,)), (row, row))


def test_one_holder_quotas_give_everything_to_one() -> None:
    assert one_holder_quotas(range(2), 1, 3) == ((0, 1, 0), (0, 1, 0))
