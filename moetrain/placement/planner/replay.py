"""Replays recorded loads through planners, one step ahead: what each would have made of a run.

Shapes: S steps, L layers, N nodes, E experts, G groups of ranks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetrain.config.errors import require, require_at_least, require_divides
from moetrain.ops.plan_placements import PlannedSeats, measure_placements, plan_placements
from moetrain.placement.planner.plan import PlannerSetup
from moetrain.placement.planner.predict import make_predictor
from moetrain.placement.planner.reshard import move_owners


@dataclass(frozen=True, slots=True)
class ReplayRules:
    """What a replay does beside planning.

    Attributes:
        predictor: by which the next loads are expected.
        move_owners_every: steps after which owners may move; 0 is never.
        warm_up: steps at the beginning that only the predictor sees; at least one.
    """

    predictor: str = "ema"
    move_owners_every: int = 0
    warm_up: int = 1

    def __post_init__(self) -> None:
        require_at_least("replay: move_owners_every", self.move_owners_every, 0, "set it to 0 to never move owners")
        require_at_least("replay: warm_up", self.warm_up, 1, "the first step has no expectation; set it to 1 or more")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one planner made of a trace: means over steps and layers, but for the moves.

    Attributes:
        planner: which.
        load_given: pairs of the worst group over the mean, under plans for the very loads that came.
        load_next: the same under plans for the loads that had been expected.
        prediction_error: absolute differences over what came, all experts of all nodes together.
        far_rows: rows of the worst group between nodes, over those of static expert parallelism.
        step_s: modelled seconds of all layers, under plans for the expected loads.
        step_ratio: that over static expert parallelism's.
        replicas: of the group with the most of a layer.
        owner_moves: experts that changed owner, over all steps and layers.
    """

    planner: str
    load_given: float
    load_next: float
    prediction_error: float
    far_rows: float
    step_s: float
    step_ratio: float
    replicas: float
    owner_moves: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Over steps; ``measure`` [pairs, near rows, far rows, replicas], means over layers."""

    load_given: float
    load_next: float
    error: float
    measure_4: Tensor
    step_s: float
    owner_moves: int
    num_steps: int


def counts_per_node(count: Tensor, num_nodes: int) -> Tensor:
    """float32 [S, L, N, E] of counts by source, [S, L, sources, E].

    Neighbouring sources make a node; where nodes are more, the tokens of a source are spread evenly over several.

    Raises:
        ValueError: neither number divides the other.
    """
    num_steps, num_layers, num_sources, num_experts = count.shape
    if num_sources >= num_nodes:
        require_divides("nodes", num_nodes, "the sources of the trace", num_sources)
        grouped = count.view(num_steps, num_layers, num_nodes, num_sources // num_nodes, num_experts)
        return grouped.sum(3, dtype=torch.int64).float()
    require_divides("the sources of the trace", num_sources, "the nodes", num_nodes)
    share = num_nodes // num_sources
    return (count.float() / share).repeat_interleave(share, dim=2)


def even_owners(setup: PlannerSetup, num_layers: int) -> Tensor:
    """int32 [L, E]: owners as expert parallelism has them."""
    experts, groups = setup.num_experts, setup.num_groups
    owner_E = torch.empty(experts, dtype=torch.int32)
    for group in range(groups):
        owner_E[group * experts // groups : (group + 1) * experts // groups] = group
    return owner_E.expand(num_layers, -1).contiguous()


def replay(
    setup: PlannerSetup, planners: Sequence[str], count_SLNE: Tensor, rules: ReplayRules | None = None
) -> list[Replayed]:
    """Plan every step from those before it, and look at what came.

    Args:
        setup: for which cluster; its planner counts for nothing.
        planners: in which order they are told.
        count_SLNE: float32, as ``counts_per_node`` gives.
        rules: how the next loads are expected, and when owners may move.

    Raises:
        ValueError: sizes that do not fit the setup, an unknown planner, no step behind those of the warm-up.
    """
    rules = rules or ReplayRules()
    require(
        count_SLNE.dim() == 4 and tuple(count_SLNE.shape[2:]) == (setup.num_nodes, setup.num_experts),
        f"replay: counts must be [steps, layers, nodes, experts] = [S, L, {setup.num_nodes}, {setup.num_experts}], got "
        f"{list(count_SLNE.shape)}",
    )
    require(
        len(count_SLNE) > rules.warm_up,
        f"replay: a trace must have more steps than the {rules.warm_up} that nothing is planned for, got "
        f"{len(count_SLNE)}; record a longer one",
    )
    found = {name: _replay_one(replace(setup, planner=name), count_SLNE, rules) for name in {"static", *planners}}
    base = found["static"]
    return [_replayed(name, found[name], base) for name in planners]


def _replayed(name: str, sums: _Sums, base: _Sums) -> Replayed:
    far, base_far = float(sums.measure_4[2]), float(base.measure_4[2])
    return Replayed(
        planner=name,
        load_given=sums.load_given / sums.num_steps,
        load_next=sums.load_next / sums.num_steps,
        prediction_error=sums.error / sums.num_steps,
        far_rows=far / base_far if base_far else float(far > 0),
        step_s=sums.step_s / sums.num_steps,
        step_ratio=sums.step_s / base.step_s if base.step_s else 1.0,
        replicas=float(sums.measure_4[3]) / sums.num_steps,
        owner_moves=sums.owner_moves,
    )


def _replay_one(setup: PlannerSetup, count_SLNE: Tensor, rules: ReplayRules) -> _Sums:
    num_layers = count_SLNE.shape[1]
    sizes = {"num_groups": setup.num_groups, "groups_per_node": setup.groups_per_node}
    predictor = make_predictor(rules.predictor, num_layers, setup.num_nodes, setup.num_experts)
    owner_LE = even_owners(setup, num_layers)
    given, following, error, step_s, moves = 0.0, 0.0, 0.0, 0.0, 0
    total_4 = torch.zeros(4, dtype=torch.float64)
    for step, count_LNE in enumerate(count_SLNE):
        expected_LNE = predictor.predict()
        if expected_LNE is not None and step >= rules.warm_up:
            if _may_move(setup, rules, step):
                moved = _owners_for(setup, expected_LNE, owner_LE, rules)
                moves, owner_LE = moves + int((moved != owner_LE).sum()), moved
            measure_L4 = measure_placements(count_LNE, owner_LE, _plan(setup, expected_LNE, owner_LE, step)[0], **sizes)
            given += _load(setup, count_LNE, _plan(setup, count_LNE, owner_LE, step)[1])
            following += _load(setup, count_LNE, measure_L4)
            step_s += sum(setup.costs.layers_s(measure_L4))
            total_4 += measure_L4.mean(0)
        predictor.observe(count_LNE)
        if step >= rules.warm_up:
            assert predictor.error is not None
            error += predictor.error
    return _Sums(given, following, error, total_4, step_s, moves, len(count_SLNE) - rules.warm_up)


def _plan(setup: PlannerSetup, count_LNE: Tensor, owner_LE: Tensor, step: int) -> tuple[PlannedSeats, Tensor]:
    return plan_placements(
        count_LNE,
        owner_LE,
        num_groups=setup.num_groups,
        groups_per_node=setup.groups_per_node,
        planner=setup.planner,
        slots=setup.slots,
        costs=setup.costs,
        seed=setup.seed + step,
    )


def _may_move(setup: PlannerSetup, rules: ReplayRules, step: int) -> bool:
    every = rules.move_owners_every
    return setup.planner not in ("static", "random") and every > 0 and step % every == 0


def _owners_for(setup: PlannerSetup, expected_LNE: Tensor, owner_LE: Tensor, rules: ReplayRules) -> Tensor:
    state_bytes = 3 * setup.costs.expert_bytes  # as in training: master and two moments
    return move_owners(
        setup, expected_LNE, owner_LE, interval_steps=rules.move_owners_every, state_bytes=state_bytes
    ).owner_LE


def _load(setup: PlannerSetup, count_LNE: Tensor, measure_L4: Tensor) -> float:
    """Pairs of the worst group over the mean, mean over layers; 1 for a layer without pairs."""
    mean_L = count_LNE.sum((1, 2), dtype=torch.float64) / setup.num_groups
    return float(torch.where(mean_L > 0, measure_L4[:, 0] / mean_L.clamp(min=1e-30), 1.0).mean())
