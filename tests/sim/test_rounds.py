"""Collectives of plans on simulated ranks, and on gloo: no order that a plan allows may end in a deadlock."""

import random
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from moetrain.mesh.traffic import TrafficCounter
from moetrain.sequence import Item, SequencePlan
from moetrain.sequence import Sequence as PlannedSequence
from moetrain.sequence.ring import GroupRing
from moetrain.sim.rounds import programs_of, run


def random_plan(rng: random.Random, num_ranks: int, block: int, *, equal: bool) -> SequencePlan:
    """Gangs of any ranks, also far apart, in the rounds of joined blocks; many lanes are empty."""
    num_blocks = num_ranks // block
    owner = [rng.randrange(1 if equal else max(1, num_blocks)) for _ in range(num_blocks)]
    sequences: list[PlannedSequence] = []
    items: list[Item] = []
    rounds = {one: rng.randint(1, 4) for one in set(owner)}
    for round_idx in range(max(rounds.values())):
        for one in rounds:
            if round_idx >= rounds[one]:
                continue
            lanes = [rank for rank in range(num_ranks) if owner[rank // block] == one and rng.random() < 0.8]
            rng.shuffle(lanes)
            while lanes:
                width = min(len(lanes), rng.choice((1, 1, 2, 3, 5)))
                ranks, lanes = tuple(sorted(lanes[:width])), lanes[width:]
                sequences.append(PlannedSequence(len(sequences), rng.randint(1, 40), 0))
                items.append(Item(len(items), round_idx, (sequences[-1].id,), ranks))
    of_rank = [rounds[owner[rank // block]] for rank in range(num_ranks)]
    return SequencePlan.of_items(sequences, items, num_ranks=num_ranks, capacity=40, block=block, rounds=of_rank)


def own_items(plan: SequencePlan) -> list[tuple[Item, ...]]:
    return [plan.items_of(rank) for rank in range(plan.num_ranks)]


def test_a_thousand_plans_come_to_an_end() -> None:
    rng = random.Random(0)
    gangs = 0
    for index in range(1000):
        block = rng.choice((1, 2, 4))
        gathers = index % 2 == 0
        plan = random_plan(rng, block * rng.randint(1, 6), block, equal=gathers)
        found = run(programs_of(own_items(plan), plan.rounds_R.tolist(), block=block, gathers=gathers))
        assert found.completed, found.told()
        gangs += sum(len(item.ranks) > 1 for item in plan.all_items())
        assert found.uses > 0
    assert gangs > 3000


def with_own_rounds(plan: SequencePlan) -> tuple[list[list[Item]], list[int]]:
    """Each rank numbers its rounds by itself, without empty lanes, which breaks the order rule."""
    items_of = [
        [Item(item.gid, place, item.sequence_ids, item.ranks) for place, item in enumerate(items)]
        for items in own_items(plan)
    ]
    return items_of, [len(items) for items in items_of]


@pytest.mark.parametrize("block", [2, 4])
def test_ranks_that_count_rounds_by_themselves_are_told_who_waits(block: int) -> None:
    rng = random.Random(1)
    stuck = 0
    for _ in range(100):
        plan = random_plan(rng, 3 * block, block, equal=False)
        items_of, rounds = with_own_rounds(plan)
        found = run(programs_of(items_of, rounds, block=block))
        if not found.completed:
            stuck += 1
            assert "waits in" in found.told()
            assert "for ranks [" in found.told()
    assert stuck > 90


def test_a_broken_round_rule_is_refused_before_anything_runs() -> None:
    """The same mistakes as a plan: joined blocks with other numbers of rounds, and rounds that do not rise."""
    sequences = [PlannedSequence(i, 4, 4) for i in range(3)]
    items = [Item(0, 0, (0,), (1, 2)), Item(1, 1, (1,), (0,)), Item(2, 1, (2,), (3,))]
    common: dict[str, Any] = {"num_ranks": 4, "capacity": 4, "block": 2}
    SequencePlan.of_items(sequences, items, **common)
    with pytest.raises(ValueError, match="item 0 joins blocks that run 3 and 2 rounds"):
        SequencePlan.of_items(sequences, items, rounds=[3, 3, 2, 2], **common)
    with pytest.raises(ValueError, match="rounds must ascend on each rank"):
        SequencePlan.of_items(sequences, [items[1], Item(0, 0, (0,), (0, 2)), items[2]], **common)


def test_two_orders_of_two_communicators() -> None:
    one, other = ("a", (0, 1)), ("b", (0, 1))
    assert run([[one, other], [one, other]]).completed
    stuck = run([[one, other], [other, one]])
    assert stuck.told() == (
        "rank 0 waits in a of ranks [0, 1], its use 0, for ranks [1]; "
        "rank 1 waits in b of ranks [0, 1], its use 0, for ranks [0]"
    )
    assert run([[], []]).uses == 0


def on_gloo(rank: int, seed: int, count: int) -> list[int]:
    """Run each plan's collectives for real; the messages of each, and what was received is checked."""
    world = dist.get_world_size()
    block = 2
    patience = timedelta(seconds=30)
    of_blocks = [list(range(first, first + block)) for first in range(0, world, block)]
    blocks = [dist.new_group(ranks, timeout=patience) for ranks in of_blocks]
    rings = dist.new_group(list(range(world)), timeout=patience)
    rng, sent = random.Random(seed), []
    for index in range(count):
        gathers = index % 2 == 0
        plan = random_plan(rng, world, block, equal=gathers)
        counter = TrafficCounter()
        at = {item.round: item for item in plan.items_of(rank)}
        for round_idx in range(plan.num_rounds(rank)):
            item = at.get(round_idx)
            for _ in range(2):
                if gathers:
                    found = [torch.zeros(1) for _ in range(world)]
                    dist.all_gather(found, torch.tensor([float(rank)]))
                    assert [int(one) for one in found] == list(range(world))
                if item is not None and len(item.ranks) > 1:
                    ring = GroupRing(rings, item.ranks, counter=counter)
                    receive = torch.zeros(1, 1)
                    ring.exchange(torch.full((1, 1), float(rank)), receive).wait()
                    assert int(receive) == item.ranks[ring.rank - 1]
                out = torch.zeros(block)
                dist.all_to_all_single(out, torch.full((block,), float(rank)), group=blocks[rank // block])
                assert out.tolist() == [float(rank // block * block + i) for i in range(block)]
        sent.append(counter.rows.get("ring", 0))
    for group in (blocks[rank // block], rings):
        dist.destroy_process_group(group)
    return sent


@pytest.mark.dist
def test_fifty_plans_on_gloo() -> None:
    found = run_on_ranks(4, on_gloo, 7, 50)
    rng = random.Random(7)
    for index in range(50):
        plan = random_plan(rng, 4, 2, equal=index % 2 == 0)
        gangs = [item for item in plan.all_items() if len(item.ranks) > 1]
        assert [of_rank[index] for of_rank in found] == [
            2 * sum(rank in item.ranks for item in gangs) for rank in range(4)
        ]
