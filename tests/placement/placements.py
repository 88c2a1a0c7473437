"""Placements for tests: random ones, with any owners, any holders and idle groups; what they have to move at least."""

import random

from moetrain.placement.placement import Affinity, Placement


def random_placement(
    seed: int, num_ranks: int, num_experts: int, num_slices: int, *, idle: int | None = None, num_shards: int = 1
) -> Placement:
    """Owners, holders, weights and affinity drawn at random; the group of rank ``idle`` owns and holds nothing.

    ``num_slices`` are those of one shard. There must be a group besides the idle one.
    """
    draw = random.Random(seed)
    num_groups = num_ranks // num_shards
    idle_group = None if idle is None else idle // num_shards
    groups = [group for group in range(num_groups) if group != idle_group or num_groups == 1]
    owners = [[draw.choice(groups) for _ in range(num_slices)] for _ in range(num_experts)]
    holders = [sorted(draw.sample(groups, draw.randint(1, len(groups)))) for _ in range(num_experts)]
    weights = [[draw.randint(0, 3) for _ in held] for held in holders]
    for one in weights:
        one[draw.randrange(len(one))] += 1
    affinity = Affinity(*draw.choice([(1, 1, 1), (4, 2, 1), (1, 1, 0), (0, 1, 1), (1, 0, 0)]))
    size = draw.choice([1, 2, num_groups])
    return Placement.of(
        num_groups, owners, holders, weights, affinity=affinity, domain_size=size, num_shards=num_shards
    )


def owners_of(placement: Placement) -> list[list[int]]:
    """The owning group of each expert's slices."""
    owners: list[list[int]] = placement.owner_ES.tolist()
    return owners


def sent_chunks(placement: Placement) -> int:
    """Chunks that one gather (or scatter) has to move between ranks at least: |holders + owner| - 1 per slice."""
    slices = sum(
        len({*placement.holders_of(expert), owner}) - 1
        for expert, owners in enumerate(owners_of(placement))
        for owner in owners
    )
    return slices * placement.num_shards


def replicated_everywhere(placement: Placement) -> Placement:
    """The same owners with every group holding every expert and serving itself (fully sharded data parallelism)."""
    everyone, own = tuple(range(placement.num_groups)), Affinity(home=1, near=0, far=0)
    owners = owners_of(placement)
    holders = [everyone] * len(owners)
    return Placement.of(placement.num_groups, owners, holders, affinity=own, num_shards=placement.num_shards)


def same(left: Placement, right: Placement) -> bool:
    """Whether all of them is equal."""
    return left.content_hash() == right.content_hash()


def server_of(placement: Placement, source: int, expert: int) -> int:
    """A holder that serves the group ``source``: the one with the largest share."""
    start, stop = placement.offset_E1[expert : expert + 2].tolist()
    return int(placement.holder_Z[start + int(placement.shares(source)[start:stop].argmax())])
