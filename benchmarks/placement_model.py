"""Modelled, not measured: what steps of Hecate's models on its clusters would take, by expert parallelism and planners.

Loads and rows are counted token by token on the corpus with top-2; seconds follow from round numbers for what hardware
sustains. A layer is attention and the experts' part, forward and backward. The latter takes as long as the group that
computes most, the one with most rows on its node, the node with most rows in or out, and what attention hides not of
the weights. Peers move owners and replicas for nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from placement_corpus import Corpus, Ints, by_node
from placement_outcome import Outcome, SeatPlan, by_token
from placement_peers import PEERS
from placement_planners import plan_ours
from torch import Tensor

from moetrain.cost.step_costs import StepCosts
from moetrain.placement.planner.predict import EmaPredictor

HISTORY = 6  # steps seen before the planned one


@dataclass(frozen=True, slots=True)
class Model:
    """Experts are two matrices of twice the width (arXiv 2502.02581, section 5)."""

    name: str
    width: int
    sequence: int
    causal: bool

    def attention_flops(self) -> float:
        """A token's, forward and backward."""
        scores = (2 if self.causal else 4) * self.sequence * self.width
        return 3.0 * (8 * self.width**2 + scores)

    def pair_flops(self) -> float:
        return 24.0 * self.width**2


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one GPU sustains; a node's network card is shared by its GPUs."""

    name: str
    flops: float
    near_bytes_s: float
    far_bytes_s: float


MODELS = (
    Model("GPT-S", 768, 2048, causal=True),
    Model("GPT-L", 1536, 2048, causal=True),
    Model("BERT", 1024, 512, causal=False),
)
CLUSTERS = (
    Hardware("A", 5e13, 1e11, 100e9 / 8 / 8),  # 4 x 8 V100, 100 Gb/s a node
    Hardware("B", 14e13, 2e11, 400e9 / 8 / 8),  # 4 x 8 A100, 400 Gb/s a node
)
CORPUS = Corpus(top_k=2)
TOKENS = 16384  # of each rank


def attention_s(model: Model, cluster: Hardware, tokens: int) -> float:
    return tokens * model.attention_flops() / cluster.flops


def costs_of(model: Model, cluster: Hardware, tokens: int, overlap: float = 1.0) -> StepCosts:
    """A row of bf16 crosses four times; of weights bf16 comes and fp32 gradients go. Attention hides the latter."""
    return StepCosts(
        pair_s=model.pair_flops() / cluster.flops,
        near_row_s=8 * model.width / cluster.near_bytes_s,
        far_row_s=8 * model.width / cluster.far_bytes_s,
        weight_byte_s=1 / cluster.far_bytes_s,
        expert_bytes=6.0 * 4 * model.width**2,
        overlap_s=overlap * attention_s(model, cluster, tokens),
    )


def layer_seconds(costs: StepCosts, found: Outcome, replicas: int, scale: float) -> float:
    """The experts' part, of ``scale`` times the corpus' tokens."""
    near = max(found.near_SG.sum(0).max(), found.near_SG.sum(1).max())
    per_node = CORPUS.groups_per_node  # which share a network card
    far_NN = found.far_SG.reshape(CORPUS.num_nodes, per_node, CORPUS.num_nodes, per_node).sum((1, 3)) / per_node
    far = max(far_NN.sum(0).max(), far_NN.sum(1).max())
    return costs.layer_s(
        pairs=scale * float(found.load_G.max()), near_rows=scale * near, far_rows=scale * far, replicas=replicas
    )


def most_replicas(corpus: Corpus, plan: SeatPlan) -> int:
    """Of any group."""
    is_replica_Z = corpus.owners()[plan.expert_Z] != plan.holder_Z
    return int(np.bincount(plan.holder_Z[is_replica_Z], minlength=corpus.num_groups).max())


@dataclass(frozen=True, slots=True)
class Scene:
    """Loads that were predicted, and the step that came."""

    predicted_NE: NDArray[np.float32]
    choice_STK: Ints
    count_SE: Ints
    seen_SE: Ints  # of the step before, which peers plan for


def scenes(corpus: Corpus, seeds: Iterable[int]) -> list[Scene]:
    found = []
    for seed in seeds:
        predictor = EmaPredictor(1, corpus.num_nodes, corpus.num_experts)
        steps = corpus.steps(seed)
        seen_SE = np.zeros((corpus.num_groups, corpus.num_experts), np.int64)
        for _ in range(HISTORY):
            seen_SE = corpus.count(next(steps))
            predictor.observe(_as_layer(seen_SE, corpus))
        predicted_LNE = predictor.predict()
        assert predicted_LNE is not None
        choice_STK = next(steps)
        found.append(Scene(predicted_LNE[0].numpy(), choice_STK, corpus.count(choice_STK), seen_SE))
    return found


def _as_layer(count_SE: Ints, corpus: Corpus) -> Tensor:
    return torch.from_numpy(by_node(count_SE, corpus.groups_per_node)).unsqueeze(0)


class Modelled:
    """Speedups over static expert parallelism on the same scenes."""

    def __init__(self, seeds: Iterable[int]) -> None:
        self._scenes = scenes(CORPUS, seeds)
        static = SeatPlan.even([[int(owner)] for owner in CORPUS.owners()], CORPUS.num_groups)
        self._static = [by_token(CORPUS, scene.choice_STK, static) for scene in self._scenes]

    def ours(self, planner: str, costs: StepCosts, other_s: float, tokens: int, *, calibrated: bool = False) -> float:
        """``calibrated``: planned on the loads that came, its weights not hidden."""
        if calibrated:
            costs = replace(costs, overlap_s=0.0)
        known = scaled(costs, tokens)
        if planner == "hecate":  # its t takes the node's whole card for each expert
            known = replace(known, weight_byte_s=known.weight_byte_s / CORPUS.groups_per_node)
        plans = [
            plan_ours(
                planner,
                CORPUS,
                by_node(scene.count_SE, CORPUS.groups_per_node) if calibrated else scene.predicted_NE,
                costs=known,
            )
            for scene in self._scenes
        ]
        return self._speedup(plans, [most_replicas(CORPUS, plan) for plan in plans], costs, other_s, tokens)

    def peer(self, name: str, costs: StepCosts, other_s: float, tokens: int) -> float:
        plans = [PEERS[name](CORPUS, scene.seen_SE) for scene in self._scenes]
        return self._speedup(plans, [0] * len(plans), costs, other_s, tokens)

    def _speedup(
        self, plans: list[SeatPlan], replicas: list[int], costs: StepCosts, other_s: float, tokens: int
    ) -> float:
        scale = tokens / CORPUS.num_tokens
        ours_s = static_s = 0.0
        for scene, plan, count, static in zip(self._scenes, plans, replicas, self._static, strict=True):
            found = by_token(CORPUS, scene.choice_STK, plan)
            ours_s += other_s + layer_seconds(costs, found, count, scale)
            static_s += other_s + layer_seconds(costs, static, 0, scale)
        return static_s / ours_s


def scaled(costs: StepCosts, tokens: int) -> StepCosts:
    """For counts of the corpus' tokens: the weights' part is that much dearer."""
    scale = CORPUS.num_tokens / tokens
    return replace(costs, expert_bytes=costs.expert_bytes * scale, overlap_s=costs.overlap_s * scale)


def speedups(modelled: Modelled) -> dict[str, dict[str, dict[str, float]]]:
    """cluster -> model -> planner."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for cluster in CLUSTERS:
        table[cluster.name] = {}
        for model in MODELS:
            costs, other_s = costs_of(model, cluster, TOKENS), attention_s(model, cluster, TOKENS)
            row = {planner: modelled.ours(planner, costs, other_s, TOKENS) for planner in ("hecate", "moetrain")}
            row["moetrain, calibrated"] = modelled.ours("moetrain", costs, other_s, TOKENS, calibrated=True)
            row |= {name: modelled.peer(name, costs, other_s, TOKENS) for name in PEERS}
            table[cluster.name][model.name] = row
    return table


def losing_map(modelled: Modelled, tokens: Iterable[int], overlaps: Iterable[float]) -> list[dict[str, float]]:
    """GPT-S on cluster A: speedups by tokens per rank and by the part of attention that hides weights."""
    model, cluster = MODELS[0], CLUSTERS[0]
    rows = []
    overlaps = tuple(overlaps)
    for count in tokens:
        for overlap in overlaps:
            costs, other_s = costs_of(model, cluster, count, overlap), attention_s(model, cluster, count)
            ours = {planner: modelled.ours(planner, costs, other_s, count) for planner in ("hecate", "moetrain")}
            rows.append({"tokens": count, "overlap": overlap, **ours})
    return rows


def break_even(rows: Iterable[Mapping[str, float]], planner: str, overlap: float) -> float | None:
    """Fewest tokens per rank from which on a planner is never slower than expert parallelism; None where it is."""
    least = None
    for row in sorted((row for row in rows if row["overlap"] == overlap), key=lambda row: row["tokens"]):
        if row[planner] < 1.0:
            least = None
        elif least is None:
            least = row["tokens"]
    return least
