import dataclasses
import re
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placement.placements import owners_of, random_placement, replicated_everywhere, same, server_of

from moetrain.placement.placement import Affinity, Placement

# Expert 0 on groups 0 and 1, expert 1 on groups 1 and 3; groups 0, 1 and 2, 3 are near each other.
SMALL = Placement.of(
    4,
    owners=[[0, 1], [1, 1]],
    holders=[[0, 1], [1, 3]],
    weights=[[3, 2], [5, 0]],
    affinity=Affinity(home=8, near=4, far=1),
    domain_size=2,
)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_questions_have_the_answers_of_the_table() -> None:
    assert (SMALL.num_experts, SMALL.num_slices, SMALL.num_seats, SMALL.num_ranks) == (2, 2, 4, 4)
    assert SMALL.offset_E1.tolist() == [0, 2, 4]
    assert SMALL.expert_Z.tolist() == [0, 0, 1, 1]
    assert [SMALL.experts_of(rank) for rank in range(4)] == [(0,), (0, 1), (), (1,)]
    assert [SMALL.owned_by(rank) for rank in range(4)] == [((0, 0),), ((0, 1), (1, 0), (1, 1)), (), ()]
    assert [SMALL.holders_of(expert) for expert in (0, 1)] == [(0, 1), (1, 3)]
    assert SMALL.most_held() == 2


def test_shares_are_weights_times_affinity() -> None:
    assert SMALL.shares(0).tolist() == [24, 8, 20, 0]
    assert SMALL.shares(1).tolist() == [12, 16, 40, 0]
    assert SMALL.shares(2).tolist() == [3, 2, 5, 0], "all seats with weight are far"
    assert SMALL.shares(3).dtype == torch.int32


def test_weights_alone_count_where_affinity_leaves_nothing() -> None:
    near_only = dataclasses.replace(SMALL, affinity=Affinity(home=1, near=1, far=0))
    assert near_only.shares(1).tolist() == [3, 2, 5, 0]
    assert near_only.shares(2).tolist() == [3, 2, 5, 0], "expert 1's near seat has no weight"


def test_ranks_of_a_group_hold_a_shard_each() -> None:
    sharded = dataclasses.replace(SMALL, num_shards=3)
    assert sharded.num_ranks == 12
    for rank in range(12):
        assert sharded.experts_of(rank) == SMALL.experts_of(rank // 3)
        assert sharded.owned_by(rank) == SMALL.owned_by(rank // 3)
        assert sharded.shard_of(rank) == rank % 3


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 7), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_owners_and_holders_are_found_from_either_side(seed: int, groups: int, experts: int, slices: int) -> None:
    placement = random_placement(seed, groups, experts, slices)
    owned = [(chunk, rank) for rank in range(groups) for chunk in placement.owned_by(rank)]
    assert len(owned) == experts * slices
    assert all(owners_of(placement)[expert][slice_idx] == rank for (expert, slice_idx), rank in owned)
    held = {(expert, rank) for rank in range(groups) for expert in placement.experts_of(rank)}
    assert held == {(expert, rank) for expert in range(experts) for rank in placement.holders_of(expert)}
    assert placement.most_held() == max(len(placement.experts_of(rank)) for rank in range(groups))


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_shares_equal_their_definition(seed: int, groups: int, experts: int) -> None:
    placement = random_placement(seed, groups, experts, 1)
    home, near, far = placement.affinity
    for source in range(groups):
        shares = placement.shares(source).tolist()
        for expert in range(experts):
            start, stop = placement.offset_E1[expert : expert + 2].tolist()
            stated = []
            for seat in range(start, stop):
                holder = int(placement.holder_Z[seat])
                is_near = holder // placement.domain_size == source // placement.domain_size
                factor = home if holder == source else near if is_near else far
                stated.append(int(placement.weight_Z[seat]) * factor)
            weights = placement.weight_Z[start:stop].tolist()
            assert shares[start:stop] == (stated if sum(stated) else weights)
            assert Fraction(sum(shares[start:stop])) > 0


def test_hashes_are_equal_exactly_where_placements_are() -> None:
    twin = dataclasses.replace(SMALL, holder_Z=SMALL.holder_Z.clone())
    others = [
        dataclasses.replace(SMALL, owner_ES=torch.tensor([[0, 0], [1, 1]], dtype=torch.int32)),
        dataclasses.replace(SMALL, holder_Z=torch.tensor([0, 2, 1, 3], dtype=torch.int32)),
        dataclasses.replace(SMALL, weight_Z=torch.tensor([3, 1, 5, 0], dtype=torch.int32)),
        dataclasses.replace(SMALL, offset_E1=ints(0, 1, 4), holder_Z=ints(0, 1, 2, 3)),
        dataclasses.replace(SMALL, affinity=Affinity(8, 4, 2)),
        dataclasses.replace(SMALL, domain_size=1),
        dataclasses.replace(SMALL, num_groups=5),
        dataclasses.replace(SMALL, num_shards=2),
    ]
    assert same(twin, SMALL)
    assert not any(same(SMALL, other) for other in others)
    assert len({placement.content_hash() for placement in (SMALL, twin, *others)}) == 9


def test_the_hash_is_the_same_in_another_process() -> None:
    code = "from placement.test_placement import SMALL; print(SMALL.content_hash())"
    folder = __file__.rpartition("/placement/")[0]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert other.stdout.strip() == SMALL.content_hash()


def test_everybody_holding_everything_keeps_owners_and_serves_itself() -> None:
    everywhere = replicated_everywhere(SMALL)
    assert owners_of(everywhere) == owners_of(SMALL)
    for rank in range(4):
        assert everywhere.experts_of(rank) == (0, 1)
        assert [server_of(everywhere, rank, expert) for expert in (0, 1)] == [rank, rank]
        assert int((everywhere.shares(rank) > 0).sum()) == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_groups": 0}, "placement.num_groups must be at least 1, got 0"),
        ({"num_shards": 0}, "placement.num_shards must be at least 1, got 0"),
        ({"domain_size": 0}, "placement.domain_size must be at least 1, got 0"),
        ({"owner_ES": torch.zeros(0, 2, dtype=torch.int32)}, "must have at least one expert and one slice, got [0, 2]"),
        ({"owner_ES": torch.zeros(2, 0, dtype=torch.int32)}, "must have at least one expert and one slice, got [2, 0]"),
        ({"owner_ES": torch.zeros(2, 2)}, "owner_ES must be a contiguous int32 tensor with 2 dimension(s) on the CPU"),
        ({"owner_ES": ints(0, 1, 4, 1).view(2, 2)}, "owner_ES must be groups below 4, got [4]; the pool has 4 groups"),
        ({"holder_Z": ints(-1, 1, 1, 3)}, "holder_Z must be groups below 4, got [-1]"),
        ({"holder_Z": ints(0, 1, 3, 1)}, "holder_Z must ascend inside each expert, each holder once, got (3, 1) for"),
        ({"holder_Z": ints(1, 1, 1, 3)}, "each holder once, got (1, 1) for expert 0; sort them and drop repeats"),
        ({"offset_E1": ints(0, 0, 4)}, "give every expert a seat, got 0 and none for experts [0]; every expert needs"),
        ({"offset_E1": ints(1, 2, 4)}, "offset_E1 must begin at 0 and give every expert a seat, got 1"),
        ({"offset_E1": ints(0, 4)}, "must have one more entry than there are experts (2), got 2"),
        ({"holder_Z": ints(0, 1, 1)}, "must have one entry per seat (4, where offset_E1 ends), got 3 and 4"),
        ({"weight_Z": ints(3, 2, 0, 0)}, "add up to 1 to 2097152 (2^24 over the largest affinity) for each expert"),
        ({"weight_Z": ints(3, 2, 9, -1)}, "must be at least 0 and add up to 1 to 2097152"),
        ({"weight_Z": ints(3, 2, 1 << 21, 1)}, "got [2097152, 1] for expert 1"),
        ({"affinity": Affinity(0, 0, 0)}, "affinity must be three numbers from 0 on, not all 0, got (0, 0, 0)"),
        ({"affinity": Affinity(1, -1, 0)}, "affinity must be three numbers from 0 on, not all 0, got (1, -1, 0)"),
    ],
)
def test_errors_name_the_field(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        dataclasses.replace(SMALL, **change)


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same number of slices, got \[1, 2\]; cut every expert as finely"):
        Placement.of(1, [[0], [0, 0]], [[0], [0]])
    with pytest.raises(ValueError, match=r"one for each of the \[2, 1\] holders of the experts, got \[1, 1\]"):
        Placement.of(2, [[0], [0]], [[0, 1], [0]], [[1], [1]])
