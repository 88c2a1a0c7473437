"""The sparse collectives on random placements: exact values, byte bounds, replica counts, and what must be noticed."""

import itertools
import re

import pytest
import torch
import torch.distributed as dist
from known import sum_of
from placement.placements import owners_of, random_placement, replicated_everywhere, sent_chunks
from ranks import run_on_ranks
from torch import Tensor

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives, SparsePlan
from moetrain.placement.static import plan_static

LENGTH = 128


def weight(expert: int, slice_idx: int) -> Tensor:
    return torch.arange(LENGTH) % 7 + 10 * slice_idx + 100 * expert


def contribution(rank: int, expert: int, slice_idx: int, dtype: torch.dtype) -> Tensor:
    """What a holder adds: small integers, or for floats in ``test_sums_run_in_ascending_order`` any number."""
    return ((torch.arange(LENGTH) * (rank + 2) + expert + 3 * slice_idx) % 11 - 5).to(dtype)


def held_chunks(placement: Placement, rank: int) -> list[tuple[int, int]]:
    return [(e, s) for e in placement.experts_of(rank) for s in range(placement.num_slices)]


def stack(chunks: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([chunk.to(dtype) for chunk in chunks]) if chunks else torch.empty(0, LENGTH, dtype=dtype)


def gather(placement: Placement, rank: int, dtype: torch.dtype, counter: TrafficCounter) -> Tensor:
    plan = SparsePlan.of(placement, rank)
    owned_CL = stack([weight(e, s) for e, s in placement.owned_by(rank)], dtype)
    held_HL = torch.full((plan.num_held, LENGTH), -1.0, dtype=dtype)
    SparseCollectives(dist.group.WORLD, rank, counter).all_gather(plan, owned_CL, held_HL)
    return held_HL


def scatter(placement: Placement, rank: int, held_HL: Tensor, counter: TrafficCounter | None = None) -> Tensor:
    plan = SparsePlan.of(placement, rank)
    owned_CL = torch.full((plan.num_owned, LENGTH), -1.0, dtype=held_HL.dtype)
    SparseCollectives(dist.group.WORLD, rank, counter).reduce_scatter(plan, held_HL, owned_CL)
    return owned_CL


def both_ways(rank: int, placement: Placement, dtype: torch.dtype, mutation: str) -> TrafficCounter:
    """Gather weights, scatter contributions; every element is compared on its rank."""
    counter = TrafficCounter()
    held_HL = gather(placement, rank, dtype, counter)
    assert torch.equal(held_HL, stack([weight(e, s) for e, s in held_chunks(placement, rank)], dtype))
    wire = torch.promote_types(dtype, torch.float32)
    given_HL = stack([contribution(rank, e, s, wire) for e, s in held_chunks(placement, rank)], wire)
    for row, (expert, _) in enumerate(held_chunks(placement, rank)):
        holders = placement.holders_of(expert)
        if mutation == "averaged":
            given_HL[row] /= len(holders)
        if mutation == "a replica dropped" and rank == holders[-1]:
            given_HL[row] = 0
        if mutation == "a neighbour's rank":
            given_HL[row] = contribution(rank + 1, expert, row, wire)
    home_CL = scatter(placement, rank, given_HL, counter)
    expected = [
        sum_of(contribution(holder, e, s, wire) for holder in placement.holders_of(e))
        for e, s in placement.owned_by(rank)
    ]
    assert torch.equal(home_CL, stack(expected, wire))
    counts_CL = scatter(placement, rank, torch.ones_like(given_HL))
    replicas = [torch.full((LENGTH,), len(placement.holders_of(e))) for e, _ in placement.owned_by(rank)]
    assert torch.equal(counts_CL, stack(replicas, wire)), "ones are reduced to the number of replicas"
    return counter


def check_traffic(placement: Placement, dtype: torch.dtype, counters: list[TrafficCounter]) -> None:
    bound = sent_chunks(placement)
    wire = torch.promote_types(dtype, torch.float32)
    for purpose, sent_dtype in (("gather", dtype), ("scatter", wire)):
        assert sum(counter.rows.get(purpose, 0) for counter in counters) == bound
        assert sum(counter.bytes.get(purpose, 0) for counter in counters) == bound * LENGTH * sent_dtype.itemsize


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_random_placements_move_the_right_chunks_and_no_more(world_size: int, num_slices: int) -> None:
    for seed, dtype in zip(range(6), itertools.cycle([torch.float32, torch.bfloat16, torch.float64]), strict=False):
        idle = seed % world_size if seed % 2 else None
        placement = random_placement(seed, world_size, 1 + seed, num_slices, idle=idle)
        counters = run_on_ranks(world_size, both_ways, placement, dtype, "none")
        check_traffic(placement, dtype, counters)


@pytest.mark.dist
@pytest.mark.parametrize("mutation", ["averaged", "a replica dropped", "a neighbour's rank"])
def test_the_checks_notice(mutation: str) -> None:
    placement = replicated_everywhere(random_placement(3, 3, 4, 2))
    with pytest.raises(AssertionError):
        run_on_ranks(3, both_ways, placement, torch.float32, mutation)


@pytest.mark.dist
def test_holders_that_are_owners_are_expert_parallelism_and_move_nothing() -> None:
    placement = plan_static(FoldedMesh(dp_shard=3, ep=3), 7)
    counters = run_on_ranks(3, both_ways, placement, torch.float32, "none")
    assert sent_chunks(placement) == 0
    assert [counter.bytes for counter in counters] == [{}, {}, {}]


@pytest.mark.dist
def test_everyone_holding_everything_is_a_dense_all_gather() -> None:
    placement = replicated_everywhere(plan_static(FoldedMesh(dp_shard=4, ep=4), 8))
    counters = run_on_ranks(4, both_ways, placement, torch.float32, "none")
    assert [counter.rows for counter in counters] == [{"gather": 6, "scatter": 6}] * 4  # 2 owned to 3 others; 6 back


@pytest.mark.dist
def test_slices_over_edp_balance_the_traffic() -> None:
    """Every rank of an edp group sends as much as the others: no root feeds them all (ZeRO-1's collectives)."""
    placement = plan_static(FoldedMesh(dp_shard=4, edp=4), 3)
    counters = run_on_ranks(4, both_ways, placement, torch.float32, "none")
    assert [counter.rows for counter in counters] == [{"gather": 9, "scatter": 9}] * 4


def float_sums(rank: int, placement: Placement, order: int) -> tuple[Tensor, bool]:
    """Floats from holders, summed twice; compared with a local sum in the given order of ranks."""

    def noise(holder: int, expert: int, slice_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(holder * 1000 + expert * 10 + slice_idx)
        return torch.randn(LENGTH, generator=generator) * 10.0**holder

    given_HL = stack([noise(rank, e, s) for e, s in held_chunks(placement, rank)], torch.float32)
    home_CL = scatter(placement, rank, given_HL)
    expected = []
    for expert, slice_idx in placement.owned_by(rank):
        total = torch.zeros(LENGTH)
        for holder in placement.holders_of(expert)[::order]:
            total += noise(holder, expert, slice_idx)
        expected.append(total)
    again_CL = scatter(placement, rank, given_HL)
    return home_CL, torch.equal(home_CL, again_CL) and torch.equal(home_CL, stack(expected, torch.float32))


@pytest.mark.dist
def test_sums_run_in_ascending_order_of_rank() -> None:
    placement = replicated_everywhere(random_placement(5, 4, 3, 2))
    first = run_on_ranks(4, float_sums, placement, 1)
    assert all(equal for _, equal in first)
    second = run_on_ranks(4, float_sums, placement, 1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert not all(equal for _, equal in run_on_ranks(4, float_sums, placement, -1)), "order matters in this data"


def test_plans_of_all_ranks_fit_together() -> None:
    for seed in range(20):
        placement = random_placement(seed, 5, 6, 2, idle=seed % 5)
        plans = [SparsePlan.of(placement, rank) for rank in range(5)]
        for source, destination in itertools.product(range(5), repeat=2):
            sent = dict(plans[source].sends).get(destination, ())
            received = dict(plans[destination].receives).get(source, ())
            owned, held = placement.owned_by(source), held_chunks(placement, destination)
            assert [owned[row] for row in sent] == [held[row] for row in received]
            assert list(sent) == sorted(sent)
            assert list(received) == sorted(received)
        assert plans[seed % 5] == SparsePlan(seed % 5, 0, 0, (), ())


def stated_plan(placement: Placement, rank: int, everywhere: bool, *, of_my_shard: bool = True) -> SparsePlan:
    """What a plan is, said of each chunk and pair of ranks; ``of_my_shard`` False forgets that ranks have shards."""
    shards, owners = placement.num_shards, owners_of(placement)
    chunks = [(e, c, s) for e in range(len(owners)) for c in range(shards) for s in range(placement.num_slices)]

    def owner(expert: int, shard: int, slice_idx: int) -> int:
        return owners[expert][slice_idx] * shards + shard

    def gets(holder: int, expert: int, shard: int, slice_idx: int) -> bool:
        has_shard = holder % shards == shard or not of_my_shard
        return everywhere or (holder // shards in placement.holders_of(expert) and has_shard)

    owned = [chunk for chunk in chunks if owner(*chunk) == rank]
    held = [chunk for chunk in chunks if gets(rank, *chunk)]
    sends, receives = {}, {}
    for other in range(placement.num_ranks):
        sends[other] = tuple(row for row, chunk in enumerate(owned) if gets(other, *chunk))
        receives[other] = tuple(row for row, chunk in enumerate(held) if owner(*chunk) == other)
    return SparsePlan(
        rank,
        len(owned),
        len(held),
        tuple((other, rows) for other, rows in sends.items() if rows),
        tuple((other, rows) for other, rows in receives.items() if rows),
    )


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_plan_is_what_it_is_said_to_be(num_shards: int, everywhere: bool) -> None:
    forgetful = 0
    for seed in range(8):
        size = num_shards * (1 + seed % 3) + (seed % 2) * (num_shards == 1)
        placement = random_placement(seed, size, 1 + seed, 1 + seed % 3, num_shards=num_shards)
        for rank in range(size):
            plan = SparsePlan.of(placement, rank, everywhere=everywhere)
            assert plan == stated_plan(placement, rank, everywhere)
            forgetful += plan != stated_plan(placement, rank, everywhere, of_my_shard=False)
    assert (forgetful > 0) == (num_shards > 1 and not everywhere)


def test_tensors_and_plans_that_do_not_fit_are_refused() -> None:
    alone = SparseCollectives(None, 0)
    placement = plan_static(FoldedMesh(), 2)
    plan = SparsePlan.of(placement, 0)
    chunks = torch.zeros(2, LENGTH)
    cases = [
        (lambda: SparseCollectives(None, 1), "group_rank must be between 0 and 0, got 1; pass this rank's position"),
        (lambda: alone.all_gather(plan, chunks[:1], chunks), "all_gather: owned chunks must be [2, L], got [1, 128]"),
        (
            lambda: alone.reduce_scatter(plan, chunks[0], chunks),
            "reduce_scatter: held chunks must be [2, L], got [128]",
        ),
        (lambda: alone.all_gather(plan, chunks, chunks[:, :5]), "one length and type, got 128 of torch.float32 and 5"),
        (lambda: alone.all_gather(plan, chunks, chunks.double()), "128 of torch.float32 and 128 of torch.float64"),
        (
            lambda: alone.reduce_scatter(plan, chunks.bfloat16(), chunks.bfloat16()),
            "gradients must be summed in at least float32, got torch.bfloat16; convert them first",
        ),
    ]
    two = plan_static(FoldedMesh(dp_shard=2, edp=2), 2)
    of_two = SparsePlan.of(two, 0)
    cases += [
        (lambda: alone.all_gather(SparsePlan.of(two, 1), chunks, chunks), "the plan is for rank 1 but this is rank 0"),
        (lambda: alone.all_gather(of_two, chunks, torch.zeros(4, LENGTH)), "names rank 1 but the group has 1 ranks"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
