"""EPLB, the expert-parallelism load balancer that DeepSeek published with V3 (2025): replicate, then pack.

Replicas go, one at a time, to the expert whose replicas carry most. Then they are packed into groups, each of which
gets the same number: heaviest first, into the lightest group with room. That is its policy over all nodes at once,
which levels loads best. Owners move with every plan. Tokens are spread evenly.
"""

import numpy as np
from numpy.typing import NDArray
from placement_corpus import Corpus, Ints
from placement_outcome import SeatPlan

Floats = NDArray[np.float64]


def plan_eplb(corpus: Corpus, count_SE: Ints) -> SeatPlan:
    expert_R, group_R = replicate_and_pack(
        count_SE.sum(0).astype(float), corpus.num_experts + corpus.num_groups * corpus.slots, corpus.num_groups
    )
    holders: list[list[int]] = [[] for _ in range(corpus.num_experts)]
    for expert, group in zip(expert_R.tolist(), group_R.tolist(), strict=True):
        if group not in holders[expert]:  # two replicas in one group are one
            holders[expert].append(group)
    return SeatPlan.even(holders, corpus.num_groups)


def plan_layers(load_LE: Floats, num_replicas: int, num_groups: int) -> list[tuple[Ints, Ints]]:
    """All layers, as a training step would ask; what the planners' times are compared on."""
    return [replicate_and_pack(load_E, num_replicas, num_groups) for load_E in load_LE]


def replicate_and_pack(load_E: Floats, num_replicas: int, num_groups: int) -> tuple[Ints, Ints]:
    """The expert and the group of each replica."""
    expert_R, each_E = replicate(load_E, num_replicas)
    return expert_R, pack(each_E[expert_R], num_groups)


def replicate(load_E: Floats, num_replicas: int) -> tuple[Ints, Floats]:
    """The expert of each replica, and what each of an expert's replicas carries."""
    num_experts = len(load_E)
    expert_R = np.empty(num_replicas, np.int64)
    expert_R[:num_experts] = np.arange(num_experts)
    count_E = np.ones(num_experts)
    for replica in range(num_experts, num_replicas):
        expert_R[replica] = hottest = int(np.argmax(load_E / count_E))
        count_E[hottest] += 1
    return expert_R, load_E / count_E


def pack(weight_R: Floats, num_groups: int) -> Ints:
    """The group of each replica; all groups get as many, but for one where that does not divide."""
    room = -(-len(weight_R) // num_groups)
    load_G, items_G = np.zeros(num_groups), np.zeros(num_groups, np.int64)
    group_R = np.empty(len(weight_R), np.int64)
    for replica in np.argsort(-weight_R, kind="stable"):
        lightest = int(np.argmin(np.where(items_G < room, load_G, np.inf)))
        group_R[replica] = lightest
        load_G[lightest] += weight_R[replica]
        items_G[lightest] += 1
    return group_R
