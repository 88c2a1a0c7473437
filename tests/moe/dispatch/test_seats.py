"""Tables of a placement for one rank of a group, and whole tiles for its seats."""

import random
from typing import Any

import pytest
import torch
from placement.placements import random_placement
from torch import Tensor

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.moe.dispatch.destinations import Destinations
from moetrain.moe.dispatch.seats import NodeDestinations, SeatChoice, SeatTables
from moetrain.placement.placement import Affinity, Placement
from moetrain.placement.static import plan_static

TILE = 4


def choices(placement: Placement) -> list[SeatChoice]:
    """What every rank of a pool without shards chooses by."""
    found = []
    for rank in range(placement.num_groups):
        choice = SeatTables(range(placement.num_groups), rank, whole_tiles=True).of(placement).choice
        assert choice is not None
        found.append(choice)
    return found


def shares(placement: Placement, count_WE: Tensor, tile: int = TILE) -> Tensor:
    """[W, Z]: what each rank finds for itself."""
    found = [choice.shares_in_tiles(count_WE, rank, tile) for rank, choice in enumerate(choices(placement))]
    return torch.stack(found).long()


def test_the_example_of_the_docstring() -> None:
    weights = [[6, 3, 7]]
    placement = Placement.of(4, [[0]], [[0, 1, 3]], weights)
    assert shares(placement, torch.tensor([[3], [5], [8], [0]])).tolist() == [
        [3, 0, 0],
        [5, 0, 0],
        [0, 0, 8],
        [0, 0, 0],
    ]


def test_seats_get_whole_tiles_and_every_rank_gives_all_it_has() -> None:
    draw = random.Random(0)
    for seed in range(30):
        placement = random_placement(seed, draw.randint(2, 7), draw.randint(1, 6), 1)
        if placement.num_seats == placement.num_experts:
            continue
        num_ranks, num_experts = placement.num_groups, placement.num_experts
        count_WE = torch.randint(0, 20, (num_ranks, num_experts))
        count_WE[0] += (-count_WE.sum(0)) % TILE  # as rounding leaves them
        count_WE[:, 0] = 0  # an expert that nobody chose
        found_WZ = shares(placement, count_WE)
        assert (found_WZ >= 0).all()
        assert (found_WZ.sum(0) % TILE == 0).all(), "whole tiles"
        of_expert_WE = torch.zeros(num_ranks, num_experts, dtype=torch.int64)
        of_expert_WE.index_add_(1, placement.expert_Z.long(), found_WZ)
        assert torch.equal(of_expert_WE, count_WE)
        # A tile is a multiple of a seat's wish to the next one: cuts are within half a tile of the wishes before them.
        wish_WZ = torch.stack([placement.shares(rank) for rank in range(num_ranks)]).double()
        total_WE = torch.zeros(num_ranks, num_experts, dtype=torch.float64)
        total_WE.index_add_(1, placement.expert_Z.long(), wish_WZ)
        wish_Z = (wish_WZ / total_WE[:, placement.expert_Z.long()] * count_WE[:, placement.expert_Z.long()]).sum(0)
        assert ((found_WZ.sum(0) - wish_Z).abs() <= TILE + 1e-9).all()


def test_an_expert_with_less_than_a_tile_has_one_seat() -> None:
    placement = Placement.of(2, [[0]], [[0, 1]])
    assert shares(placement, torch.tensor([[1], [1]])).tolist() in ([[0, 1], [0, 1]], [[1, 0], [1, 0]])


def test_experts_are_the_destinations_where_each_has_one_seat() -> None:
    static = plan_static(FoldedMesh(dp_shard=4, edp=2, ep=2), 6)
    seats = SeatTables((2, 3), 1).of(static)
    assert seats.choice is None
    assert isinstance(seats.to, Destinations)
    assert seats.to.rank_E.tolist() == [0, 0, 0, 1, 1, 1]
    assert seats.to.local_E.tolist() == [0, 1, 2, 0, 1, 2]
    assert (seats.to.max_local, seats.to.num_local, seats.to.num_ranks) == (3, 3, 2)


def test_seats_are_the_destinations_elsewhere() -> None:
    placement = Placement.of(4, [[0], [1], [2]], [[0, 2], [1, 3], [0, 2, 3]], affinity=Affinity(1, 1, 1))
    seats = SeatTables(range(4), 2, per_node=2).of(placement)
    assert isinstance(seats.to, NodeDestinations)
    assert seats.to.ranks.rank_E.tolist() == [0, 2, 1, 3, 0, 2, 3]
    assert seats.to.ranks.local_E.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert seats.to.nodes.rank_E.tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert seats.to.nodes.local_E.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert seats.to.inside.rank_E.tolist() == [0, 1, 0, 1], "seats of node 1: ranks 2, 3, 2, 3"
    assert seats.to.inside.local_E.tolist() == [0, 0, 1, 1]
    assert (seats.to.nodes.max_local, seats.to.inside.num_local) == (4, 2)


def test_messages_are_sized_by_the_most_that_may_be_held() -> None:
    placement = Placement.of(4, [[0], [1], [2]], [[0, 2], [1, 3], [0, 2, 3]])
    seats = SeatTables(range(4), 1, per_node=2, most_held=3).of(placement)
    assert isinstance(seats.to, NodeDestinations)
    assert (seats.to.ranks.max_local, seats.to.nodes.max_local) == (3, 6)
    assert seats.to.inside.rank_E.tolist() == [0, 1, 0, 0, 0, 0], "filled up"
    with pytest.raises(ValueError, match="sized for at most 1 experts on a rank, but a placement has 2 on one"):
        SeatTables(range(4), 1, most_held=1).of(placement)


def test_tables_are_made_once_and_the_oldest_forgotten() -> None:
    tables = SeatTables(range(3), 0, num_kept=2)
    placements = [random_placement(seed, 3, 4, 1) for seed in range(3)]
    first = tables.of(placements[0])
    assert tables.of(random_placement(0, 3, 4, 1)) is first, "equal placements share them"
    tables.of(placements[1])
    assert tables.of(placements[0]) is first
    tables.of(placements[2])
    assert tables.of(placements[0]) is first
    assert len(tables._kept) == 2


@pytest.mark.parametrize(("per_node", "whole_tiles"), [(None, False), (None, True), (2, False)])
def test_tables_are_kept_while_their_bytes_allow(per_node: int | None, whole_tiles: bool) -> None:
    placements = [random_placement(seed, 4, 6, 2) for seed in range(4)]
    options: dict[str, Any] = {"per_node": per_node, "whole_tiles": whole_tiles}
    each = [SeatTables(range(4), 0, **options).of(placement).num_bytes() for placement in placements]
    plain = SeatTables(range(4), 0).of(placements[0])
    assert plain.choice is not None
    if whole_tiles:
        assert each[0] == plain.num_bytes() + 4 * 4 * len(plain.choice.share_Z), "a number for each rank and seat"
    elif per_node is None:
        choice = plain.choice
        lists = (choice.offset_E1, choice.holder_Z, choice.share_Z, choice.expert_Z)
        assert isinstance(plain.to, Destinations)
        assert each[0] == sum(x.nbytes for x in (*lists, plain.to.rank_E, plain.to.local_E))
    else:
        assert each[0] > plain.num_bytes()
    tables = SeatTables(range(4), 0, max_bytes=each[1] + each[2], **options)
    made = [tables.of(placement) for placement in placements[:3]]
    assert tables.of(placements[2]) is made[2]
    assert tables.of(placements[1]) is made[1]
    assert tables.of(placements[0]) is not made[0], "they were more than the bytes allow"
    alone = SeatTables(range(4), 0, max_bytes=1, **options)
    last = alone.of(placements[3])
    assert alone.of(placements[3]) is last, "the last one is kept whatever it has"
