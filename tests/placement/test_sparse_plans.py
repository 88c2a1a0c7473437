"""The plans of all ranks together: they fit, deliver each chunk once, send no more than they must, and are spread."""

import itertools

import pytest
import torch
from placement.exchanges import held_chunks, holding_ranks, minimum_chunks, owned_chunks
from placement.placements import owners_of, random_placement, replicated_everywhere

from moetrain.placement.placement import Placement
from moetrain.placement.sparse import Collective, SparsePlan

COLLECTIVES: tuple[Collective, ...] = ("all_gather", "reduce_scatter")
Messages = dict[tuple[int, int, int], list[int]]  # (hop, source, destination) -> chunks

# Ranks, ranks of a node, shards.
POOLS = [(5, None, 1), (6, None, 2), (6, 2, 1), (6, 2, 2), (6, 4, 2), (7, 3, 1), (9, 3, 3), (12, 4, 2), (12, 1, 1)]


def all_messages(
    placement: Placement, collective: Collective, ranks_per_node: int | None, *, everywhere: bool = False
) -> Messages:
    """As the senders' plans have them, after comparing them with the receivers'."""
    plans = [
        SparsePlan.of(placement, rank, ranks_per_node=ranks_per_node, everywhere=everywhere)
        for rank in range(placement.num_ranks)
    ]
    sent: Messages = {}
    received: Messages = {}
    for hop, plan in itertools.product((0, 1), plans):
        for peer, chunks in plan.messages(collective, hop, sends=True).items():
            sent[hop, plan.rank, peer] = chunks
        for peer, chunks in plan.messages(collective, hop, sends=False).items():
            received[hop, peer, plan.rank] = chunks
    assert sent == received
    assert all(a < b for chunks in sent.values() for a, b in itertools.pairwise(chunks))
    for plan in plans:
        counts = [0] * placement.num_ranks
        for (_, source, destination), chunks in sent.items():
            counts[destination] += len(chunks) * (source == plan.rank)
        assert plan.sent_chunks(collective) == counts
        assert counts[plan.rank] == 0
    return sent


def number_of(placement: Placement, expert: int, shard: int, slice_idx: int) -> int:
    return (expert * placement.num_shards + shard) * placement.num_slices + slice_idx


def pools_of(seed: int, num_ranks: int, num_shards: int) -> Placement:
    idle = seed % num_ranks if seed % 3 else None
    return random_placement(seed, num_ranks, 1 + seed, 1 + seed % 3, idle=idle, num_shards=num_shards)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node", "num_shards"), POOLS)
def test_gathers_deliver_each_chunk_once_and_pass_on_what_has_come(
    num_ranks: int, ranks_per_node: int | None, num_shards: int
) -> None:
    for seed in range(8):
        placement = pools_of(seed, num_ranks, num_shards)
        has = {rank: {number_of(placement, *c) for c in owned_chunks(placement, rank)} for rank in range(num_ranks)}
        got: dict[int, list[int]] = {rank: [] for rank in range(num_ranks)}
        messages = all_messages(placement, "all_gather", ranks_per_node)
        for hop in (0, 1):
            arrived = []
            for (at, source, destination), chunks in messages.items():
                if at == hop:
                    assert has[source].issuperset(chunks)
                    arrived.append((destination, chunks))
            for destination, chunks in arrived:
                has[destination].update(chunks)
                got[destination] += chunks
        for rank in range(num_ranks):
            owned = {number_of(placement, *c) for c in owned_chunks(placement, rank)}
            held = {number_of(placement, *c) for c in held_chunks(placement, rank)}
            assert sorted(got[rank]) == sorted(held - owned)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node", "num_shards"), POOLS)
def test_scatters_bring_each_contribution_home_once(
    num_ranks: int, ranks_per_node: int | None, num_shards: int
) -> None:
    for seed in range(8):
        placement = pools_of(seed, num_ranks, num_shards)
        # What a rank has of each chunk: the ranks whose contributions are in it.
        has = {
            rank: {number_of(placement, *c): [rank] for c in held_chunks(placement, rank)} for rank in range(num_ranks)
        }
        messages = all_messages(placement, "reduce_scatter", ranks_per_node)
        for hop in (0, 1):
            arrived = []
            for (at, source, destination), chunks in messages.items():
                if at == hop:
                    arrived += [(destination, chunk, has[source].pop(chunk)) for chunk in chunks]
            for destination, chunk, ranks in arrived:
                has[destination][chunk] = has[destination].get(chunk, []) + ranks
        for rank in range(num_ranks):
            expected = {
                number_of(placement, *chunk): holding_ranks(placement, chunk[0], chunk[1])
                for chunk in owned_chunks(placement, rank)
            }
            assert {chunk: sorted(ranks) for chunk, ranks in has[rank].items()} == expected


@pytest.mark.parametrize(("num_ranks", "ranks_per_node", "num_shards"), POOLS)
def test_no_more_moves_than_must(num_ranks: int, ranks_per_node: int | None, num_shards: int) -> None:
    more = 0
    for seed, collective in itertools.product(range(8), COLLECTIVES):
        placement = pools_of(seed, num_ranks, num_shards)
        messages = all_messages(placement, collective, ranks_per_node)
        nodes_of = ranks_per_node or 2 * num_shards
        total, between = minimum_chunks(placement, nodes_of)
        assert sum(map(len, messages.values())) == total
        crossing = sum(len(c) for (_, a, b), c in messages.items() if a // nodes_of != b // nodes_of)
        if ranks_per_node is None:
            more += crossing - between
        else:
            assert crossing == between
            assert {hop for hop, a, b in messages if a // nodes_of != b // nodes_of} <= {COLLECTIVES.index(collective)}
    assert (more > 0) == (ranks_per_node is None), "one level crosses more often"


def test_leaders_are_spread_over_their_node() -> None:
    """Experts of one node's owners reach the other node by all of its ranks, and so does every fourth of them."""
    everyone = replicated_everywhere(Placement.of(8, [[e % 2] for e in range(16)], [[0]] * 16))
    assert led_chunks(everyone) == {4: 4, 5: 4, 6: 4, 7: 4}
    fourth = replicated_everywhere(Placement.of(8, [[0 if e % 4 == 0 else 7] for e in range(16)], [[0]] * 16))
    assert led_chunks(fourth) == {0: 3, 1: 3, 2: 3, 3: 3, 4: 1, 5: 1, 6: 1, 7: 1}


def led_chunks(placement: Placement) -> dict[int, int]:
    """Chunks that come to each rank from the other node of four."""
    led: dict[int, int] = {}
    for (_, source, leader), chunks in sorted(all_messages(placement, "all_gather", 4).items()):
        if source // 4 != leader // 4:
            led[leader] = led.get(leader, 0) + len(chunks)
    return dict(sorted(led.items()))


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("ranks_per_node", [None, 3])
def test_everywhere_means_every_shard_of_every_expert(num_shards: int, ranks_per_node: int | None) -> None:
    for seed in range(6):
        size = num_shards * (1 + seed % 3)
        placement = random_placement(seed, size, 1 + seed, 1 + seed % 3, num_shards=num_shards)
        messages = all_messages(placement, "all_gather", ranks_per_node, everywhere=True)
        chunks = list(itertools.product(range(placement.num_experts), range(num_shards), range(placement.num_slices)))
        for rank in range(size):
            plan = SparsePlan.of(placement, rank, ranks_per_node=ranks_per_node, everywhere=True)
            owned = owned_chunks(placement, rank)
            assert (plan.num_owned, plan.num_held) == (len(owned), len(chunks))
            got = [chunk for (_, _, to), sent in messages.items() if to == rank for chunk in sent]
            assert sorted(got) == [n for n, chunk in enumerate(chunks) if chunk not in owned]


def test_direct_plans_are_what_they_are_said_to_be() -> None:
    """Each pair of ranks, stated from the placement alone."""
    for seed in range(8):
        placement = random_placement(seed, 6, 1 + seed, 1 + seed % 3, num_shards=1 + seed % 2)
        shards, owners = placement.num_shards, owners_of(placement)
        stated: Messages = {}
        for e, shard, s in itertools.product(range(len(owners)), range(shards), range(placement.num_slices)):
            owner = owners[e][s] * shards + shard
            for holder in holding_ranks(placement, e, shard):
                if holder != owner:
                    stated.setdefault((0, owner, holder), []).append(number_of(placement, e, shard, s))
        assert all_messages(placement, "all_gather", None) == stated
        home = {(hop, b, a): chunks for (hop, a, b), chunks in stated.items()}
        assert all_messages(placement, "reduce_scatter", None) == home


def test_ranks_without_experts_have_plans_too() -> None:
    placement = random_placement(1, 5, 6, 2, idle=3)
    plan = SparsePlan.of(placement, 3)
    assert (plan.num_owned, plan.num_held) == (0, 0)
    assert plan.sent_chunks("all_gather") == [0] * 5
    assert plan.num_staged("reduce_scatter") == (0, 0)


def test_arrays_that_are_no_placement_are_refused_natively() -> None:
    """``Placement`` refuses them first; whoever calls the class without one is told too."""
    good = Placement.of(2, [[0], [1]], [[0, 1], [1]])
    arrays = {"owner_ES": good.owner_ES, "offset_E1": good.offset_E1, "holder_Z": good.holder_Z}
    cases = [
        ("owner_ES", torch.tensor([[0], [2]], dtype=torch.int32), "owner_ES must be groups below 2, got 2"),
        ("holder_Z", torch.tensor([0, -1, 1], dtype=torch.int32), "holder_Z must be groups below 2, got -1"),
        ("holder_Z", torch.tensor([1, 0, 1], dtype=torch.int32), "expert 0 must ascend, each once, got 1 before 0"),
        ("offset_E1", torch.tensor([0, 0, 3], dtype=torch.int32), "expert 0 must have a holder"),
        ("offset_E1", torch.tensor([0, 2], dtype=torch.int32), "offset_E1 must be"),
        ("offset_E1", torch.tensor([0, 2, 4], dtype=torch.int32), "end at the number of seats, 3, got 0 and 4"),
    ]
    for name, value, text in cases:
        plan = torch.classes.moetrain.SparsePlan
        with pytest.raises(ValueError, match=text.replace("[", r"\[")):
            plan(*{**arrays, name: value}.values(), 2, 1, 0, 2, False)
