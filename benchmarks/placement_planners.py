"""moetrain's own planners on the loads of one layer, as ``SeatPlan``."""

import time
from dataclasses import replace

import numpy as np
import torch
from placement_corpus import Corpus
from placement_outcome import SeatPlan
from torch import Tensor

from moetrain.cost.step_costs import UNMEASURED, StepCosts
from moetrain.ops import plan_placements
from moetrain.placement.planner.calibrate import calibrate
from moetrain.placement.planner.plan import PlannerSetup, plan_layers


def plan_ours(planner: str, corpus: Corpus, count_NE: np.ndarray, *, costs: StepCosts = UNMEASURED) -> SeatPlan:
    """Count is [N, E]."""
    setup = PlannerSetup(
        planner, corpus.num_experts, corpus.num_groups, corpus.groups_per_node, corpus.slots, costs=costs
    )
    count_1NE = torch.from_numpy(np.ascontiguousarray(count_NE, dtype=np.float32)).unsqueeze(0)
    (placement,), _ = plan_layers(setup, count_1NE, torch.from_numpy(corpus.owners().astype(np.int32)).unsqueeze(0))
    return SeatPlan.of(placement)


def split_anew(corpus: Corpus, planned_NE: np.ndarray, true_NE: np.ndarray) -> SeatPlan:
    """Replicas by the loads that were planned for, tokens split by those that came: no weights move."""
    setup = PlannerSetup(
        "moetrain",
        corpus.num_experts,
        corpus.num_groups,
        corpus.groups_per_node,
        corpus.slots,
        costs=replace(UNMEASURED, weight_byte_s=1.0, expert_bytes=1.0, overlap_s=float(corpus.slots)),
    )
    owner_1E = torch.from_numpy(corpus.owners().astype(np.int32)).unsqueeze(0)
    (placement,), _ = plan_layers(setup, torch.from_numpy(planned_NE).unsqueeze(0), owner_1E)
    return SeatPlan.of(calibrate(setup, torch.from_numpy(true_NE), placement))


def skewed_layers(corpus: Corpus, num_layers: int) -> Tensor:
    """[L, N, E] float32: popularities of Zipf's law, each layer's in an order of its own."""
    random = np.random.default_rng(0)
    popularity_E = np.arange(1, corpus.num_experts + 1) ** -corpus.zipf
    pairs = corpus.num_tokens * corpus.groups_per_node * corpus.top_k
    expected_LE = np.stack([random.permutation(popularity_E) for _ in range(num_layers)]) * pairs / popularity_E.sum()
    count_LNE = random.poisson(np.repeat(expected_LE[:, None], corpus.num_nodes, axis=1))
    return torch.from_numpy(count_LNE.astype(np.float32))


def planner_ms(planner: str, corpus: Corpus, count_LNE: Tensor, *, rounds: int) -> float:
    """CPU time of all layers in one call on one thread, the best of several: work beside it does not count."""
    owner_LE = torch.from_numpy(corpus.owners().astype(np.int32)).expand(len(count_LNE), -1).contiguous()
    taken = []
    for _ in range(rounds + 1):
        start = time.thread_time()
        plan_placements(
            count_LNE,
            owner_LE,
            num_groups=corpus.num_groups,
            groups_per_node=corpus.groups_per_node,
            planner=planner,
            slots=corpus.slots,
        )
        taken.append(time.thread_time() - start)
    return min(taken[1:]) * 1e3
