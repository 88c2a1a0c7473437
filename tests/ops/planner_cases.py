"""Counts to plan for, and what a placement makes of them, told source by source."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.plan_placements import PlannedSeats


@dataclass(frozen=True, slots=True)
class Pool:
    """G groups on N nodes."""

    num_groups: int
    groups_per_node: int

    @property
    def num_nodes(self) -> int:
        return self.num_groups // self.groups_per_node

    def sizes(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "groups_per_node": self.groups_per_node}

    def node_of(self, group: int) -> int:
        return group // self.groups_per_node


def skewed_counts(seed: int, num_layers: int, pool: Pool, num_experts: int, *, zipf: float = 0.8) -> Tensor:
    """[L, N, E] float32, whole numbers; every node wants much the same experts."""
    random = torch.Generator().manual_seed(seed)
    rank_E = torch.arange(1, num_experts + 1, dtype=torch.float64)
    expected_E = rank_E**-zipf
    expected_E *= 4096 * pool.groups_per_node / expected_E.sum()
    order_LE = torch.rand(num_layers, num_experts, generator=random).argsort(dim=1)
    expected_LNE = expected_E[order_LE].unsqueeze(1).expand(-1, pool.num_nodes, -1)
    return torch.poisson(expected_LNE.contiguous(), generator=random).float()


def even_owners(num_layers: int, pool: Pool, num_experts: int) -> Tensor:
    """[L, E] int32, as expert parallelism has them."""
    owner_E = torch.arange(num_experts) * pool.num_groups // num_experts
    return owner_E.int().expand(num_layers, -1).contiguous()


def seats_of(seats: PlannedSeats, layer: int) -> list[dict[int, int]]:
    """Per expert: holder -> weight."""
    offsets = seats.offset_LE1[layer].tolist()
    holders, weights = seats.holder_LZ[layer].tolist(), seats.weight_LZ[layer].tolist()
    return [dict(zip(holders[begin:end], weights[begin:end], strict=True)) for begin, end in pairwise(offsets)]


def shares_of(holders: dict[int, int], affinity: list[int], source: int, pool: Pool) -> dict[int, int]:
    """What each holder gets of a source's tokens, as whole numbers to divide by their sum."""
    home, near, far = affinity
    shares = {}
    for holder, weight in holders.items():
        same_node = pool.node_of(holder) == pool.node_of(source)
        shares[holder] = weight * (home if holder == source else near if same_node else far)
    return shares if any(shares.values()) else holders


def told_measure(count_NE: Tensor, owners: list[int], seats: PlannedSeats, layer: int, pool: Pool) -> list[float]:
    """The measure of one layer, by going through every source, expert and holder."""
    groups = range(pool.num_groups)
    pairs, near_in, far_in, near_out, far_out = ([0.0] * pool.num_groups for _ in range(5))
    replicas = [0] * pool.num_groups
    for expert, holders in enumerate(seats_of(seats, layer)):
        for holder in holders:
            replicas[holder] += holder != owners[expert]
        for source in groups:
            count = float(count_NE[pool.node_of(source), expert]) / pool.groups_per_node
            shares = shares_of(holders, seats.affinity_L3[layer].tolist(), source, pool)
            for holder, share in shares.items():
                moved = count * share / sum(shares.values())
                pairs[holder] += moved
                if holder != source:
                    same_node = pool.node_of(holder) == pool.node_of(source)
                    (near_in if same_node else far_in)[holder] += moved
                    (near_out if same_node else far_out)[source] += moved
    for out in (near_out, far_out):  # the model knows a node's sources together
        for node in range(pool.num_nodes):
            here = slice(node * pool.groups_per_node, (node + 1) * pool.groups_per_node)
            out[here] = [sum(out[here]) / pool.groups_per_node] * pool.groups_per_node
    return [max(pairs), max(*near_in, *near_out), max(*far_in, *far_out), float(max(replicas))]
