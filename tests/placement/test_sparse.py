"""The sparse collectives on random placements: exact values, byte bounds, orders of sums, and what must be noticed."""

import itertools
import re

import pytest
import torch
from known import sum_of
from placement.exchanges import (
    LENGTH,
    collectives,
    contribution,
    gathered,
    held_chunks,
    holding_ranks,
    minimum_chunks,
    noise,
    owned_chunks,
    scattered,
    stack,
    summed,
    weight,
)
from placement.placements import random_placement, replicated_everywhere, sent_chunks
from ranks import run_on_ranks
from torch import Tensor

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives, SparsePlan
from moetrain.placement.static import plan_static

Case = tuple[Placement, torch.dtype, torch.dtype]  # owned chunks are of the first type, held ones of the second

# Ranks, ranks of a node (None: direct), shards. Nodes may have one rank, or fewer than the others.
LAYOUTS = [
    (1, None, 1),
    (2, None, 1),
    (4, None, 2),
    (4, 2, 1),
    (4, 2, 2),
    (4, 1, 1),
    (8, None, 1),
    (8, 4, 1),
    (8, 4, 2),
    (8, 3, 1),
]
TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float64),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]


def both_ways(
    rank: int, cases: list[Case], ranks_per_node: int | None, nodes_of: int, mutation: str
) -> list[TrafficCounter]:
    """Gather weights, scatter contributions; every element is compared on its rank. A counter for each case."""
    sparse = collectives(rank, ranks_per_node)
    counters = []
    for placement, owned, wire in cases:
        before = sum(sparse.sent_bytes())
        sparse.counter = TrafficCounter(ranks_per_node=nodes_of)
        held_HL = gathered(sparse, placement, owned, wire)
        assert torch.equal(held_HL, stack([weight(*chunk) for chunk in held_chunks(placement, rank)], wire))
        scatter_and_compare(sparse, placement, torch.promote_types(wire, torch.float32), mutation)
        assert sum(sparse.counter.bytes.values()) == sum(sparse.sent_bytes()) - before, "counted is what was sent"
        counters.append(sparse.counter)
        sparse.counter = None
        ones_HL = torch.ones(len(held_chunks(placement, rank)), LENGTH)
        counts = [torch.full((LENGTH,), len(placement.holders_of(e))) for e, _, _ in owned_chunks(placement, rank)]
        assert torch.equal(scattered(sparse, placement, ones_HL), stack(counts, torch.float32)), "numbers of replicas"
    return counters


def scatter_and_compare(sparse: SparseCollectives, placement: Placement, dtype: torch.dtype, mutation: str) -> None:
    rank = sparse.group_rank
    given_HL = stack([contribution(rank, *chunk, dtype) for chunk in held_chunks(placement, rank)], dtype)
    for row, (expert, shard, slice_idx) in enumerate(held_chunks(placement, rank)):
        holders = holding_ranks(placement, expert, shard)
        if mutation == "averaged":
            given_HL[row] /= len(holders)
        if mutation == "a replica dropped" and rank == holders[-1]:
            given_HL[row] = 0
        if mutation == "a neighbour's rank":
            given_HL[row] = contribution(rank + 1, expert, shard, slice_idx, dtype)
    expected = [
        sum_of(contribution(holder, e, shard, s, dtype) for holder in holding_ranks(placement, e, shard))
        for e, shard, s in owned_chunks(placement, rank)
    ]
    assert torch.equal(scattered(sparse, placement, given_HL), stack(expected, dtype))


def check_traffic(case: Case, nodes_of: int, two_level: bool, counters: list[TrafficCounter]) -> None:
    placement, _, wire = case
    total, between = minimum_chunks(placement, nodes_of)
    assert total == sent_chunks(placement)
    for purpose, sent_dtype in (("gather", wire), ("scatter", torch.promote_types(wire, torch.float32))):
        assert sum(counter.rows.get(purpose, 0) for counter in counters) == total
        assert sum(counter.bytes.get(purpose, 0) for counter in counters) == total * LENGTH * sent_dtype.itemsize
        crossing = sum(counter.between_nodes.get(purpose, 0) for counter in counters)
        assert crossing >= between * LENGTH * sent_dtype.itemsize
        if two_level:
            assert crossing == between * LENGTH * sent_dtype.itemsize


@pytest.mark.dist
@pytest.mark.parametrize(("world_size", "ranks_per_node", "num_shards"), LAYOUTS)
@pytest.mark.parametrize("num_slices", [1, 3])
def test_random_placements_move_the_right_chunks_and_no_more(
    world_size: int, ranks_per_node: int | None, num_shards: int, num_slices: int
) -> None:
    cases = []
    for seed, (owned, wire) in zip(range(10), itertools.cycle(TYPES), strict=False):
        idle = seed % world_size if seed % 2 else None
        placement = random_placement(seed, world_size, 1 + seed % 7, num_slices, idle=idle, num_shards=num_shards)
        cases.append((placement, owned, wire))
    nodes_of = ranks_per_node or 2
    by_rank = run_on_ranks(world_size, both_ways, cases, ranks_per_node, nodes_of, "none")
    for case, counters in zip(cases, zip(*by_rank, strict=True), strict=True):
        check_traffic(case, nodes_of, ranks_per_node is not None, list(counters))


@pytest.mark.dist
def test_direct_traffic_crosses_nodes_once_per_holder() -> None:
    """So that the bound between nodes is one which two levels reach and one level does not."""
    placement = replicated_everywhere(random_placement(3, 4, 5, 1))
    counters = run_on_ranks(4, both_ways, [(placement, torch.float32, torch.float32)], None, 2, "none")
    crossing = sum(counter.between_nodes["gather"] for (counter,) in counters)
    assert crossing == 2 * minimum_chunks(placement, 2)[1] * LENGTH * 4


@pytest.mark.dist
@pytest.mark.parametrize("ranks_per_node", [None, 2])
@pytest.mark.parametrize("mutation", ["averaged", "a replica dropped", "a neighbour's rank"])
def test_the_checks_notice(mutation: str, ranks_per_node: int | None) -> None:
    placement = replicated_everywhere(random_placement(3, 3, 4, 2))
    cases = [(placement, torch.float32, torch.float32)]
    with pytest.raises(AssertionError):
        run_on_ranks(3, both_ways, cases, ranks_per_node, 2, mutation)


@pytest.mark.dist
def test_holders_that_are_owners_are_expert_parallelism_and_move_nothing() -> None:
    placement = plan_static(FoldedMesh(dp_shard=3, ep=3), 7)
    counters = run_on_ranks(3, both_ways, [(placement, torch.float32, torch.float32)], None, 1, "none")
    assert sent_chunks(placement) == 0
    assert [counter.bytes for (counter,) in counters] == [{}, {}, {}]


@pytest.mark.dist
def test_everyone_holding_everything_is_a_dense_all_gather() -> None:
    placement = replicated_everywhere(plan_static(FoldedMesh(dp_shard=4, ep=4), 8))
    counters = run_on_ranks(4, both_ways, [(placement, torch.float32, torch.float32)], None, 1, "none")
    rows = {"gather": 6, "scatter": 6}  # 2 owned to 3 others; 6 back
    assert [counter.rows for (counter,) in counters] == [rows] * 4


@pytest.mark.dist
def test_slices_over_edp_balance_the_traffic() -> None:
    """Every rank of an edp group sends as much as the others: no root feeds them all (ZeRO-1's collectives)."""
    placement = plan_static(FoldedMesh(dp_shard=4, edp=4), 3)
    counters = run_on_ranks(4, both_ways, [(placement, torch.float32, torch.bfloat16)], None, 1, "none")
    assert [counter.rows for (counter,) in counters] == [{"gather": 9, "scatter": 9}] * 4


def float_sums(
    rank: int, placements: list[Placement], ranks_per_node: int | None, assumed: int
) -> tuple[list[dict[tuple[int, int, int], Tensor]], bool]:
    """Sums of floats by chunk, for each placement; whether they are those of nodes of ``assumed`` ranks, and again."""
    sparse = collectives(rank, ranks_per_node)
    found, as_stated = [], True
    for placement in placements:
        given_HL = stack([noise(rank, *chunk) for chunk in held_chunks(placement, rank)], torch.float32)
        home_CL = scattered(sparse, placement, given_HL)
        assert torch.equal(home_CL, scattered(sparse, placement, given_HL)), "run to run"
        sums = {}
        for row, (e, shard, s) in enumerate(owned_chunks(placement, rank)):
            holders = holding_ranks(placement, e, shard)
            expected = summed([noise(holder, e, shard, s) for holder in holders], holders, assumed)
            as_stated = as_stated and torch.equal(home_CL[row], expected)
            sums[e, shard, s] = home_CL[row].clone()
        found.append(sums)
    return found, as_stated


def moved(placement: Placement, seed: int) -> Placement:
    """Other owners, the same holders."""
    generator = torch.Generator().manual_seed(seed)
    owner_ES = torch.randint(placement.num_groups, placement.owner_ES.shape, generator=generator, dtype=torch.int32)
    assert not torch.equal(owner_ES, placement.owner_ES)
    return Placement(
        num_groups=placement.num_groups,
        owner_ES=owner_ES,
        offset_E1=placement.offset_E1,
        holder_Z=placement.holder_Z,
        weight_Z=placement.weight_Z,
        num_shards=placement.num_shards,
    )


@pytest.mark.dist
@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(4, None), (4, 2), (8, 4), (8, 3)])
def test_sums_ascend_by_rank_and_node_whoever_owns(world_size: int, ranks_per_node: int | None) -> None:
    few, all_hold = random_placement(5, world_size, 4, 2), random_placement(6, world_size, 3, 2)
    all_hold = replicated_everywhere(all_hold)
    placements = [few, all_hold, moved(few, 1), moved(all_hold, 1), moved(few, 2), moved(all_hold, 2)]
    nodes_of = ranks_per_node or world_size
    by_rank = run_on_ranks(world_size, float_sums, placements, ranks_per_node, nodes_of)
    assert all(as_stated for _, as_stated in by_rank)
    merged = [{chunk: value for found, _ in by_rank for chunk, value in found[n].items()} for n in range(6)]
    for first, other in ((0, 2), (0, 4), (1, 3), (1, 5)):
        assert merged[first].keys() == merged[other].keys()
        assert all(torch.equal(value, merged[other][chunk]) for chunk, value in merged[first].items())


@pytest.mark.dist
@pytest.mark.parametrize(("ranks_per_node", "assumed"), [(None, 2), (2, 4), (2, 1)])
def test_other_orders_of_sums_are_noticed(ranks_per_node: int | None, assumed: int) -> None:
    placements = [replicated_everywhere(random_placement(5, 4, 3, 2))]
    by_rank = run_on_ranks(4, float_sums, placements, ranks_per_node, assumed)
    assert not all(as_stated for _, as_stated in by_rank)


@pytest.mark.dist
def test_messages_that_lie_in_one_piece_are_not_copied() -> None:
    """No staging for gathers of one block per rank; a scatter stages what it adds up, and nothing that is sent."""
    owners = [[rank] for rank in range(4) for _ in range(2)]
    blocks = replicated_everywhere(Placement.of(4, owners, [[0]] * 8))
    for rank in range(4):
        plan = SparsePlan.of(blocks, rank)
        assert plan.num_staged("all_gather") == (0, 0)
        assert plan.num_staged("all_gather", converts=True) == (0, 0), "converted into the held rows, sent from there"
        assert plan.num_staged("reduce_scatter") == (2 * 3, 0)
    alternating = replicated_everywhere(Placement.of(4, [[e % 4] for e in range(8)], [[0]] * 8))
    plan = SparsePlan.of(alternating, 1)
    assert plan.num_staged("all_gather") == (2 * 3, 0), "owned rows lie together, held ones do not"
    assert plan.num_staged("all_gather", converts=True) == (2 + 2 * 3, 0), "three equal messages are packed once"
    for placement in (blocks, alternating):
        run_on_ranks(4, both_ways, [(placement, torch.float32, torch.bfloat16)], None, 2, "none")
    elsewhere = Placement.of(2, [[1], [1]], [[0], [0]])  # a store that computes nothing
    for rank in range(2):
        for collective in ("all_gather", "reduce_scatter"):
            assert SparsePlan.of(elsewhere, rank).num_staged(collective) == (0, 0)
    run_on_ranks(2, both_ways, [(elsewhere, torch.float32, torch.float32)], None, 1, "none")


def test_tensors_and_plans_that_do_not_fit_are_refused() -> None:
    alone = SparseCollectives(None, 0)
    plan = alone.plan(plan_static(FoldedMesh(), 2))
    chunks = torch.zeros(2, LENGTH)
    two = plan_static(FoldedMesh(dp_shard=2, edp=2), 2)
    cases = [
        (lambda: SparseCollectives(None, 1), "rank must be between 0 and 0, got 1; pass this rank's position"),
        (lambda: SparseCollectives(None, 0, ranks_per_node=0), "ranks_per_node must be at least 1, got 0"),
        (lambda: SparseCollectives(None, 0, max_plans=0), "max_plans must be at least 1, got 0"),
        (lambda: SparsePlan.of(two, 2), "rank must be between 0 and 1, got 2; pass this rank's position"),
        (lambda: alone.plan(two), "the placement is for 2 ranks but the group has 1; place experts on this group"),
        (lambda: alone.all_gather(plan, chunks[:1], chunks), "all_gather: owned chunks must be [2, L], got [1, 96]"),
        (lambda: alone.reduce_scatter(plan, chunks[0], chunks), "reduce_scatter: held chunks must be [2, L], got [96]"),
        (lambda: alone.all_gather(plan, chunks, chunks[:, :5].clone()), "must have one length, got 96 and 5"),
        (lambda: alone.all_gather(plan, chunks, chunks[:, ::2]), "held must be contiguous"),
        (
            lambda: alone.reduce_scatter(plan, chunks.bfloat16(), chunks.bfloat16()),
            "gradients must be summed in at least float32, got BFloat16; convert them first",
        ),
        (
            lambda: alone.reduce_scatter(plan, chunks.double(), chunks),
            "owned chunks must be at least as wide as Double, got Float",
        ),
        (
            lambda: alone.all_gather(SparsePlan.of(two, 0), chunks, chunks),
            "the plan is for 2 ranks but the group has 1; plan for this group",
        ),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    with pytest.raises(TypeError, match="owned must be float32, bfloat16, float16 or float64, got Int"):
        alone.all_gather(plan, chunks.int(), chunks)


def refusals_of_two(rank: int) -> None:
    placement = replicated_everywhere(plan_static(FoldedMesh(dp_shard=2, ep=2), 2))
    owned, held = torch.zeros(1, LENGTH), torch.zeros(2, LENGTH)
    direct = collectives(rank, None)
    with pytest.raises(ValueError, match=f"the plan is for rank {1 - rank} but this is rank {rank}; derive it for"):
        direct.all_gather(SparsePlan.of(placement, 1 - rank), owned, held)
    with pytest.raises(ValueError, match="the plan is for nodes of 1 ranks but the collectives are for nodes of 2"):
        direct.all_gather(SparsePlan.of(placement, rank, ranks_per_node=1), owned, held)


@pytest.mark.dist
def test_plans_of_others_are_refused() -> None:
    run_on_ranks(2, refusals_of_two)
