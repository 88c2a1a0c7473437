"""LAER-MoE's load-adaptive expert re-layout (2026): all places of all groups are laid out anew each step.

Each expert gets places in proportion to its load, one at a time to the one whose replicas carry most; replicas go,
heaviest first, to the node that has fewest of that expert and there to the lightest group with room. Tokens are spread
evenly over the replicas of their own node, or over all where it has none.
"""

import numpy as np
from placement_corpus import Corpus, Ints
from placement_outcome import SeatPlan

from placement_peers.eplb import replicate


def plan_laer(corpus: Corpus, count_SE: Ints) -> SeatPlan:
    num_places = corpus.num_experts + corpus.num_groups * corpus.slots
    expert_R, each_E = replicate(count_SE.sum(0).astype(float), num_places)
    room_G = np.full(corpus.num_groups, -(-num_places // corpus.num_groups))
    load_G = np.zeros(corpus.num_groups)
    node_G = np.arange(corpus.num_groups) // corpus.groups_per_node
    holders: list[list[int]] = [[] for _ in range(corpus.num_experts)]
    for replica in np.argsort(-each_E[expert_R], kind="stable"):
        expert = int(expert_R[replica])
        on_node_N = np.bincount(node_G[holders[expert]], minlength=corpus.num_nodes)
        open_G = room_G > 0
        open_G[holders[expert]] = False
        if not open_G.any():
            continue
        fewest = on_node_N[node_G[open_G]].min()
        candidate_G = np.where(open_G & (on_node_N[node_G] == fewest), load_G, np.inf)
        group = int(np.argmin(candidate_G))
        holders[expert].append(group)
        room_G[group] -= 1
        load_G[group] += each_E[expert]
    even = SeatPlan.even(holders, corpus.num_groups)
    near_SZ = node_G[:, None] == node_G[even.holder_Z]
    any_near_SZ = np.add.reduceat(near_SZ, even.offset_E1[:-1], axis=1)[:, even.expert_Z] > 0
    return SeatPlan(even.offset_E1, even.holder_Z, (near_SZ | ~any_near_SZ).astype(np.int64))
