"""What sparse collectives must give, said of each chunk alone; bodies of ranks that compare every element with it."""

import itertools

import torch
import torch.distributed as dist
from placement.placements import owners_of
from torch import Tensor

from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives

LENGTH = 96


def weight(expert: int, shard: int, slice_idx: int) -> Tensor:
    """Small whole numbers, exact in bfloat16, that differ from chunk to chunk."""
    return torch.arange(LENGTH) % 7 + 3 * slice_idx + 11 * shard + 16 * expert


def contribution(rank: int, expert: int, shard: int, slice_idx: int, dtype: torch.dtype) -> Tensor:
    """What a holder adds: small whole numbers."""
    return ((torch.arange(LENGTH) * (rank + 2) + expert + 3 * slice_idx + 5 * shard) % 11 - 5).to(dtype)


def noise(rank: int, expert: int, shard: int, slice_idx: int) -> Tensor:
    """What a holder adds where the order of sums shows in the last bits."""
    generator = torch.Generator().manual_seed(rank * 1000 + expert * 10 + slice_idx + 100_000 * shard)
    return torch.randn(LENGTH, generator=generator) * 10.0 ** (rank % 5)


def held_chunks(placement: Placement, rank: int) -> list[tuple[int, int, int]]:
    """(expert, shard, slice) of what a rank holds."""
    shard = placement.shard_of(rank)
    return [(e, shard, s) for e in placement.experts_of(rank) for s in range(placement.num_slices)]


def owned_chunks(placement: Placement, rank: int) -> list[tuple[int, int, int]]:
    """(expert, shard, slice) of what a rank owns."""
    return [(e, placement.shard_of(rank), s) for e, s in placement.owned_by(rank)]


def holding_ranks(placement: Placement, expert: int, shard: int) -> list[int]:
    """Pool ranks that hold a shard of an expert, ascending."""
    return [group * placement.num_shards + shard for group in placement.holders_of(expert)]


def stack(chunks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[N, L], of no chunks too."""
    return torch.stack([chunk.to(dtype) for chunk in chunks]) if chunks else torch.empty(0, LENGTH, dtype=dtype)


def summed(terms: list[Tensor], ranks: list[int], ranks_per_node: int) -> Tensor:
    """Terms of ascending ranks: over each node, then over the nodes, from the first on."""
    nodes = itertools.groupby(zip(ranks, terms, strict=True), key=lambda pair: pair[0] // ranks_per_node)
    sums = []
    for _, pairs in nodes:
        inside = [term for _, term in pairs]
        total = inside[0].clone()
        for term in inside[1:]:
            total += term
        sums.append(total)
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total


def collectives(rank: int, ranks_per_node: int | None, counter: TrafficCounter | None = None) -> SparseCollectives:
    """Over the default group."""
    return SparseCollectives(dist.group.WORLD, rank, counter, ranks_per_node=ranks_per_node)


def gathered(sparse: SparseCollectives, placement: Placement, owned: torch.dtype, wire: torch.dtype) -> Tensor:
    """The held chunks after an all-gather of known weights."""
    plan = sparse.plan(placement)
    owned_CL = stack([weight(*chunk) for chunk in owned_chunks(placement, sparse.group_rank)], owned)
    held_HL = torch.full((plan.num_held, LENGTH), -1.0, dtype=wire)
    sparse.all_gather(plan, owned_CL, held_HL)
    return held_HL


def scattered(sparse: SparseCollectives, placement: Placement, held_HL: Tensor) -> Tensor:
    """The owned chunks after a reduce-scatter."""
    plan = sparse.plan(placement)
    owned_CL = torch.full((plan.num_owned, LENGTH), -1.0, dtype=held_HL.dtype)
    sparse.reduce_scatter(plan, held_HL, owned_CL)
    return owned_CL


def minimum_chunks(placement: Placement, ranks_per_node: int) -> tuple[int, int]:
    """Chunks that have to move, in all and between nodes: |holders + owner| - 1, and the same of their nodes."""
    total = between = 0
    for expert, owners in enumerate(owners_of(placement)):
        for shard, owner in itertools.product(range(placement.num_shards), owners):
            ranks = {*holding_ranks(placement, expert, shard), owner * placement.num_shards + shard}
            total += len(ranks) - 1
            between += len({rank // ranks_per_node for rank in ranks}) - 1
    return total, between
