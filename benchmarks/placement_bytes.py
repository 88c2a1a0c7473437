"""Bytes that the sparse collectives move, over the least that any could: for planned placements, on local ranks.

Least, for each chunk: its holders and its owner, less one; between nodes: their nodes, less one. Weights travel in the
compute type, gradients in float32, each counted apart; what is counted is what each rank hands to the process group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.cost.step_costs import UNMEASURED
from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.placement import Placement
from moetrain.placement.planner.plan import PlannerSetup, plan_layers
from moetrain.placement.sparse import SparseCollectives
from moetrain.testing.ranks import RankPools

RANKS, PER_NODE, EXPERTS, LAYERS, CHUNK = 8, 4, 16, 6, 1024  # ranks, experts, layers, elements of an expert
Figures = dict[str, Any]


def placements(planner: str) -> list[Placement]:
    """Of layers with skewed loads; owners anywhere."""
    rng = torch.Generator().manual_seed(3)
    count_LNE = torch.rand(LAYERS, RANKS // PER_NODE, EXPERTS, generator=rng) ** 4 * 1000
    owner_LE = torch.randint(RANKS, (LAYERS, EXPERTS), generator=rng, dtype=torch.int32)
    setup = PlannerSetup(
        planner=planner, num_experts=EXPERTS, num_groups=RANKS, groups_per_node=PER_NODE, slots=2, costs=UNMEASURED
    )
    return plan_layers(setup, count_LNE, owner_LE)[0]


def least_chunks(placement: Placement) -> tuple[int, int]:
    """Chunks that must move, and those of them that must cross between nodes."""
    moved = crossed = 0
    for expert, owner in enumerate(placement.owner_ES[:, 0].tolist()):
        ranks = {owner, *placement.holders_of(expert)}
        moved += len(ranks) - 1
        crossed += len({rank // PER_NODE for rank in ranks}) - 1
    return moved, crossed


def exchange(rank: int, placed: list[Placement], two_level: bool) -> dict[str, tuple[int, int]]:
    """Gather bfloat16 weights, reduce float32 gradients, of all layers; this rank's bytes, and those between nodes."""
    counter = TrafficCounter(ranks_per_node=PER_NODE)
    nodes = PER_NODE if two_level else None
    collectives = SparseCollectives(dist.group.WORLD, rank, counter, ranks_per_node=nodes)
    for placement in placed:
        plan = collectives.plan(placement)
        owned_CL: Tensor = torch.ones(plan.num_owned, CHUNK, dtype=torch.bfloat16)
        held_HL = torch.empty(plan.num_held, CHUNK, dtype=torch.bfloat16)
        collectives.all_gather(plan, owned_CL, held_HL)
        collectives.reduce_scatter(plan, held_HL.float(), torch.empty(plan.num_owned, CHUNK))
    return {name: (counter.bytes.get(name, 0), counter.between_nodes.get(name, 0)) for name in ("gather", "scatter")}


def bytes_figures(quick: bool) -> Figures:
    """``bytes_over_bound`` of all ranks together, both ways; ``node_bytes_over_bound`` of two levels."""
    over: list[float] = []
    node_over: list[float] = []
    direct_over: list[float] = []
    with RankPools() as pools:
        for planner in ("hecate", "moetrain", "full"):
            placed = placements(planner)
            least, least_nodes = (sum(one) for one in zip(*map(least_chunks, placed), strict=True))
            for two_level in (False, True):
                found = pools.run(RANKS, exchange, placed, two_level)
                for name, itemsize in (("gather", 2), ("scatter", 4)):
                    total, between = (sum(one[name][which] for one in found) for which in (0, 1))
                    over.append(total / (least * CHUNK * itemsize))
                    (node_over if two_level else direct_over).append(between / (least_nodes * CHUNK * itemsize))
    return {
        "bytes_over_bound": max(over),
        "node_bytes_over_bound": max(node_over),
        "node_bytes_over_bound_direct": max(direct_over),
    }
