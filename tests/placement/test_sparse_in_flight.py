"""Sparse collectives in flight: several at once, two halves of staging memory, second hops, threads, and failures."""

import gc
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
    owned_chunks,
    scattered,
    stack,
    weight,
)
from placement.placements import random_placement, replicated_everywhere
from ranks import run_on_ranks

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives, SparsePlan
from moetrain.placement.static import plan_static


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
        assert held == 2 * LENGTH * (2 * gathers + 4 * scatters), "two halves, each as large as the largest plan wants"


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
