import pytest
from placement.placements import same

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.placement.placement import Placement
from moetrain.placement.static import plan_static

MESHES = [(edp, ep) for edp in range(1, 9) for ep in range(1, 9) if edp * ep <= 8]


def served_by(placement: Placement, rank: int, expert: int) -> int:
    """The rank that gets all of a rank's tokens for an expert."""
    source, shard = divmod(rank, placement.num_shards)
    start, stop = placement.offset_E1[expert : expert + 2].tolist()
    share = placement.shares(source)[start:stop].tolist()
    assert sum(map(bool, share)) == 1
    return placement.holders_of(expert)[share.index(max(share))] * placement.num_shards + shard


def check(placement: Placement, edp: int, ep: int, num_experts: int) -> None:
    mesh = FoldedMesh(dp_shard=edp * ep, edp=edp, ep=ep)
    assert placement.num_ranks == edp * ep
    assert placement.num_experts == num_experts
    for rank in range(edp * ep):
        ep_idx, edp_idx = mesh.coordinate(rank, "ep"), mesh.coordinate(rank, "edp")
        expected = tuple(range(ep_idx * num_experts // ep, (ep_idx + 1) * num_experts // ep))
        assert placement.experts_of(rank) == expected
        assert placement.owned_by(rank) == tuple((expert, edp_idx) for expert in expected)
        for expert in range(num_experts):
            assert served_by(placement, rank, expert) in mesh.group_of(rank, "ep"), "dispatch stays inside the ep group"


@pytest.mark.parametrize(("edp", "ep"), MESHES)
@pytest.mark.parametrize("num_experts", [1, 3, 8, 13])
def test_experts_are_spread_evenly_and_sliced_over_edp(edp: int, ep: int, num_experts: int) -> None:
    mesh = FoldedMesh(dp_shard=edp * ep, edp=edp, ep=ep)
    placement = plan_static(mesh, num_experts)
    check(placement, edp, ep, num_experts)
    held = [len(placement.experts_of(rank)) for rank in range(edp * ep)]
    assert max(held) - min(held) <= 1
    assert sum(held) == edp * num_experts


@pytest.mark.parametrize(("edp", "ep", "etp"), [(1, 1, 2), (2, 1, 3), (1, 2, 2), (2, 2, 2), (3, 2, 4)])
@pytest.mark.parametrize("num_experts", [1, 5])
def test_each_part_has_its_holders_and_owners(edp: int, ep: int, etp: int, num_experts: int) -> None:
    mesh = FoldedMesh(dp_shard=edp * ep * etp, edp=edp, ep=ep, etp=etp)
    placement = plan_static(mesh, num_experts)
    assert placement.num_shards == etp
    owned = []
    for rank in range(mesh.pool_size):
        ep_idx, shard = mesh.coordinate(rank, "ep"), mesh.coordinate(rank, "etp")
        expected = tuple(range(ep_idx * num_experts // ep, (ep_idx + 1) * num_experts // ep))
        assert placement.experts_of(rank) == expected
        for expert, slice_idx in placement.owned_by(rank):
            assert placement.shard_of(rank) == shard
            assert rank // etp in placement.holders_of(expert)
            owned.append((expert, shard, slice_idx))
        for expert in range(num_experts):
            assert served_by(placement, rank, expert) in mesh.group_of(rank, "ep"), "rows do not change their shard"
    assert sorted(owned) == [(e, shard, at) for e in range(num_experts) for shard in range(etp) for at in range(edp)]
    per_rank = {len(placement.owned_by(rank)) for rank in range(mesh.pool_size)}
    assert max(per_rank) - min(per_rank) <= 1


def test_fewer_experts_than_ep_leaves_ranks_without() -> None:
    placement = plan_static(FoldedMesh(dp_shard=4, ep=4), 2)
    assert [placement.experts_of(rank) for rank in range(4)] == [(), (0,), (), (1,)]
    assert [served_by(placement, 0, expert) for expert in range(2)] == [1, 3]


def test_the_pool_of_a_stage_does_not_depend_on_pp() -> None:
    flat = FoldedMesh(dp_shard=4, edp=2, ep=2)
    staged = FoldedMesh(pp=2, dp_shard=4, edp=2, ep=2)
    assert same(plan_static(flat, 5), plan_static(staged, 5))


def test_a_pool_of_4096_ranks_is_planned_without_large_tables() -> None:
    placement = plan_static(FoldedMesh(dp_shard=4096, edp=64, ep=64), 256)
    assert placement.experts_of(4095) == (252, 253, 254, 255)
    assert placement.owned_by(65) == tuple((expert, 1) for expert in range(4, 8))
    assert placement.num_seats == 64 * 256


def test_the_checks_notice_the_other_rank_order() -> None:
    """Mutation: with edp innermost in place of ep the check fails."""
    right = plan_static(FoldedMesh(dp_shard=6, edp=2, ep=3), 6)
    place = {edp_idx * 3 + ep_idx: ep_idx * 2 + edp_idx for edp_idx in range(2) for ep_idx in range(3)}
    moved = [sorted(place[rank] for rank in right.holders_of(expert)) for expert in range(6)]
    check(right, 2, 3, 6)
    with pytest.raises(AssertionError):
        check(Placement.of(6, moved, moved, affinity=right.affinity, domain_size=3), 2, 3, 6)


def test_errors() -> None:
    with pytest.raises(ValueError, match="plan_static: num_experts must be at least 1, got 0"):
        plan_static(FoldedMesh(), 0)
