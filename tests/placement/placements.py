"""Placements for tests: random ones, with any owners, any holders and idle ranks, and one held by everybody."""

import random

from moetrain.placement.placement import Placement, one_holder_quotas


def random_placement(
    seed: int, num_ranks: int, num_experts: int, num_slices: int, *, idle: int | None = None, num_shards: int = 1
) -> Placement:
    """Owners and holders drawn at random; rank ``idle`` owns and holds nothing. One holder serves each source.

    ``num_slices`` are those of one shard. There must be ranks for all shards besides the idle one.
    """
    draw = random.Random(seed)
    ranks = [rank for rank in range(num_ranks) if rank != idle or num_ranks == 1]
    owners = tuple(tuple(draw.choice(ranks) for _ in range(num_slices * num_shards)) for _ in range(num_experts))
    drawn = [draw.sample(ranks, draw.randint(1, len(ranks))) for _ in range(num_experts)]
    if num_shards > 1:
        of_shard = [[rank for rank in ranks if rank % num_shards == shard] for shard in range(num_shards)]
        drawn = [held + [draw.choice(choices) for choices in of_shard] for held in drawn]
    holders = tuple(tuple(sorted(set(held))) for held in drawn)
    quotas = []
    for _ in range(num_ranks):
        serving = [draw.randrange(len(held)) for held in holders]
        row = (
            tuple(int(idx == chosen) for idx in range(len(held))) for chosen, held in zip(serving, holders, strict=True)
        )
        quotas.append(tuple(row))
    return Placement(num_ranks, owners, holders, tuple(quotas), num_shards)


def replicated_everywhere(placement: Placement) -> Placement:
    """The same owners with every rank holding its shard of every expert (fully sharded data parallelism)."""
    everyone = tuple(range(placement.num_ranks))
    experts = range(placement.num_experts)
    quotas = tuple(one_holder_quotas(experts, source, len(everyone)) for source in everyone)
    return Placement(placement.num_ranks, placement.owners, (everyone,) * len(experts), quotas, placement.num_shards)


def sent_chunks(placement: Placement) -> int:
    """Chunks that one gather (or scatter) has to move between ranks at least: |holders + owner| - 1 per slice."""
    return sum(
        len({*placement.holders[expert], owner}) - 1
        for expert, owners in enumerate(placement.owners)
        for owner in owners
    )
