"""The sparse collectives on random placements: exact values, byte bounds, orders of sums, and what must be noticed."""

import gc
import itertools
import re
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from known import sum_of, world_group
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


def in_flight(rank: int, placements: list[Placement], ranks_per_node: int | None, order: str) -> int:
    """Start gathers and scatters of every placement before any is waited for, in rounds. Bytes of staging memory."""
    sparse = collectives(rank, ranks_per_node)
    staging = []
    for _ in range(3):
        started = []
        for placement in placements:
            plan = sparse.plan(placement)
            owned_CL = stack([weight(*chunk) for chunk in owned_chunks(placement, rank)], torch.float32)
            held_HL = torch.full((plan.num_held, LENGTH), -1.0, dtype=torch.bfloat16)
            work = sparse.start_all_gather(plan, owned_CL, held_HL)
            expected = stack([weight(*chunk) for chunk in held_chunks(placement, rank)], torch.bfloat16)
            started.append((work, held_HL, expected))
            given_HL = stack(
                [contribution(rank, *chunk, torch.float32) for chunk in held_chunks(placement, rank)], torch.float32
            )
            home_CL = torch.full((plan.num_owned, LENGTH), -1.0)
            work = sparse.start_reduce_scatter(plan, given_HL, home_CL)
            sums = [
                sum_of(contribution(holder, e, c, s, torch.float32) for holder in holding_ranks(placement, e, c))
                for e, c, s in owned_chunks(placement, rank)
            ]
            started.append((work, home_CL, stack(sums, torch.float32)))
        for work, found, expected in started if order == "first to last" else started[::-1]:
            if order == "progress first":
                work.progress()
            work.wait()
            assert torch.equal(found, expected)
        staging.append(sparse.arena_bytes())
    assert staging[2] == staging[1], "the third round allocates nothing"
    return staging[1]


@pytest.mark.dist
@pytest.mark.parametrize("ranks_per_node", [None, 2])
@pytest.mark.parametrize("order", ["first to last", "last to first", "progress first"])
def test_several_are_in_flight_in_two_halves_of_an_arena(ranks_per_node: int | None, order: str) -> None:
    placements = [random_placement(seed, 4, 5, 2, idle=seed % 4 if seed % 2 else None) for seed in range(5)]
    staging = run_on_ranks(4, in_flight, placements, ranks_per_node, order)
    for rank, held in enumerate(staging):
        plans = [SparsePlan.of(placement, rank, ranks_per_node=ranks_per_node) for placement in placements]
        gathers = max(sum(plan.num_staged("all_gather", converts=True)) for plan in plans)
        scatters = max(sum(plan.num_staged("reduce_scatter")) for plan in plans)
        assert held <= 2 * LENGTH * (2 * gathers + 4 * scatters)


def resident_bytes() -> int:
    """What the process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def many_plans(rank: int, count: int) -> tuple[int, int, int, int]:
    """A new plan for each of ``count`` exchanges: memory after a quarter and at the end, plans kept, staging."""
    sparse = SparseCollectives(world_group(), rank, max_plans=20, ranks_per_node=1)
    resident = []
    for seed in range(count):
        placement = random_placement(seed, 2, 16, 2)
        held_HL = gathered(sparse, placement, torch.float32, torch.bfloat16)
        scattered(sparse, placement, held_HL.float())
        if seed in (count // 4, count - 1):
            gc.collect()
            resident.append(resident_bytes())
    return resident[0], resident[1], sparse.num_plans(), sparse.arena_bytes()


@pytest.mark.dist
def test_memory_does_not_grow_with_plans() -> None:
    for early, late, plans, staging in run_on_ranks(2, many_plans, 400):
        assert plans == 20
        assert late <= early * 1.02
        # At most 32 chunks are received, and as many sent or added up, in each half of the two arenas.
        assert staging <= 2 * 64 * LENGTH * (2 + 4)


def test_plans_are_remembered_by_what_is_in_them() -> None:
    sparse = SparseCollectives(None, 0, max_plans=2)
    first, second, third = (plan_static(FoldedMesh(), experts) for experts in (1, 2, 3))
    again = plan_static(FoldedMesh(), 1)
    for placement, kept in ((first, 1), (second, 2), (again, 2), (third, 2)):
        assert sparse.plan(placement).num_held == placement.num_experts
        assert sparse.num_plans() == kept
    plan = sparse.plan(second)  # was dropped, and is planned anew
    assert (plan.num_held, sparse.num_plans()) == (2, 2)
    held_CL = torch.zeros(2, 4)
    sparse.all_gather(plan, torch.ones(2, 4), held_CL)
    assert held_CL.eq(1).all()


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


def one_sends_late(rank: int) -> bool:
    """Rank 1 waits in a thread for what rank 0 sends when rank 1's main thread has spoken to it."""
    beside = dist.new_group(timeout=timedelta(seconds=20))
    sparse = collectives(rank, None)
    plan = sparse.plan(Placement.of(2, [[0]], [[1]]))
    held_HL = torch.zeros(rank, LENGTH)
    owned_CL = torch.ones(1 - rank, LENGTH)
    if rank == 0:
        dist.recv(torch.zeros(1), 1, group=beside)
        sparse.all_gather(plan, owned_CL, held_HL)
        return True
    work = sparse.start_all_gather(plan, owned_CL, held_HL)
    thread = threading.Thread(target=work.wait)
    thread.start()
    time.sleep(0.05)
    dist.send(torch.zeros(1), 0, group=beside)
    thread.join()
    return bool(held_HL.eq(1).all())


@pytest.mark.dist
def test_waiting_keeps_no_other_thread_from_running() -> None:
    assert run_on_ranks(2, one_sends_late) == [True, True]


def second_hop(rank: int, progresses: bool) -> str:
    """The leader, rank 0, goes on to a barrier that rank 1 reaches when it has its chunk; the error of who has not."""
    group = dist.new_group(timeout=timedelta(seconds=20 if progresses else 0.5))
    beside = dist.new_group(timeout=timedelta(seconds=20))
    sparse = SparseCollectives(group, rank, ranks_per_node=2)
    plan = sparse.plan(Placement.of(3, [[2]], [[0, 1]]))
    held_HL = torch.zeros(plan.num_held, LENGTH)
    work = sparse.start_all_gather(plan, torch.ones(plan.num_owned, LENGTH), held_HL)
    error = ""
    if rank == 0 and progresses:
        work.progress()
    elif rank != 0:
        try:
            work.wait()
        except RuntimeError as raised:
            error = str(raised)
    dist.barrier(beside)
    if rank == 0 and progresses:
        work.wait()
    assert error or held_HL.eq(1).all() or not progresses
    return error


@pytest.mark.dist
def test_progress_sends_the_second_hop() -> None:
    assert run_on_ranks(3, second_hop, True) == ["", "", ""]
    errors = run_on_ranks(3, second_hop, False)
    assert errors[0] == errors[2] == ""
    assert "from rank 0 in hop 2 of collective 0 (gather)" in errors[1], "nothing moves it without"


def waits_in_vain(rank: int, ranks_per_node: int | None, leaves: bool) -> list[str]:
    """The last rank starts nothing, or leaves the group; the others' errors."""
    size = dist.get_world_size()
    group = dist.new_group(timeout=timedelta(seconds=20 if leaves else 0.5))
    dist.barrier(group)
    sparse = SparseCollectives(group, rank, ranks_per_node=ranks_per_node)
    errors: list[str] = []
    if leaves and rank == size - 1:
        dist.destroy_process_group(group)
        del sparse, group
        gc.collect()
    elif rank < size - 1:
        plan = sparse.plan(replicated_everywhere(Placement.of(size, [[size - 1]], [[0]])))
        held_HL = torch.zeros(plan.num_held, LENGTH)
        for _ in range(2):
            try:
                sparse.all_gather(plan, held_HL[: plan.num_owned], held_HL, purpose="weights")
            except RuntimeError as error:
                errors.append(str(error))
    dist.barrier()
    return errors


@pytest.mark.dist
def test_an_error_says_who_waited_for_what_from_whom() -> None:
    (first, again), _ = run_on_ranks(2, waits_in_vain, None, False)
    waited = "all_gather: rank 0 of 2 waited in vain for 1 chunk(s), 384 bytes, from rank 1 in hop 1 of collective 0"
    assert f"SparseCollectives.{waited} (weights): " in first
    assert "; look at what rank 1 reports, and start all ranks again" in first
    assert again.startswith("SparseCollectives: nothing more can be exchanged after an earlier failure; start all")
    assert waited in again
    (gone, _), _ = run_on_ranks(2, waits_in_vain, None, True)
    assert waited in gone
    assert re.search("Connection (closed|reset) by peer", gone)
    errors = run_on_ranks(4, waits_in_vain, 2, False)
    assert "rank 0 of 4 waited in vain for 1 chunk(s), 384 bytes, from rank 3 in hop 1" in errors[0][0]
    assert "rank 1 of 4 waited in vain for 1 chunk(s), 384 bytes, from rank 0 in hop 2" in errors[1][0]


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
