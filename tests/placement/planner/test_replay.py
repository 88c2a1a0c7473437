"""A replay against what it must come to where that is known."""

from dataclasses import replace

import pytest
import torch
from ops.planner_cases import Pool, even_owners, skewed_counts
from torch import Tensor

from moetrain.cost.step_costs import UNMEASURED, StepCosts
from moetrain.ops.plan_placements import measure_placements, plan_placements
from moetrain.placement.planner import replay as replay_module
from moetrain.placement.planner.plan import PlannerSetup
from moetrain.placement.planner.replay import Replayed, ReplayRules, counts_per_node, replay

POOL = Pool(num_groups=8, groups_per_node=4)
EXPERTS, LAYERS = 16, 3
SETUP = PlannerSetup("static", EXPERTS, POOL.num_groups, POOL.groups_per_node, slots=2, costs=UNMEASURED)
PLANNERS = ("static", "hecate", "moetrain", "full")


def steady(num_steps: int) -> Tensor:
    """[S, L, N, E]: the same loads in every step."""
    return skewed_counts(3, LAYERS, POOL, EXPERTS).expand(num_steps, -1, -1, -1)


def worst_node(count_LNE: Tensor) -> float:
    """Pairs of the node with most tokens over the mean, mean over layers."""
    pairs_LN = count_LNE.sum(2).double()
    return float((pairs_LN.amax(1) / pairs_LN.mean(1)).mean())


def by_name(found: list[Replayed]) -> dict[str, Replayed]:
    return {one.planner: one for one in found}


def test_steady_loads_are_predicted_and_given_is_next() -> None:
    found = by_name(replay(SETUP, PLANNERS, steady(5)))
    for one in found.values():
        assert one.prediction_error == pytest.approx(0, abs=1e-6)
        assert one.load_next == pytest.approx(one.load_given, rel=1e-5)
    assert (found["static"].step_ratio, found["static"].far_rows, found["static"].replicas) == (1, 1, 0)
    assert found["full"].load_next == pytest.approx(worst_node(steady(1)[0]), rel=1e-6), "everybody serves itself"
    assert found["full"].far_rows == 0
    assert found["full"].replicas == EXPERTS - EXPERTS / POOL.num_groups
    assert found["moetrain"].load_next < found["hecate"].load_next < found["static"].load_next
    assert found["moetrain"].replicas <= 2
    assert [one.planner for one in replay(SETUP, ["full", "static"], steady(2))] == ["full", "static"]


def test_a_step_is_planned_from_those_before_it_alone() -> None:
    """After an abrupt change plans for expected loads are off, those for given loads are not."""
    other = steady(1).flip(-1)
    counts = torch.cat([steady(1), other])
    found = by_name(replay(SETUP, PLANNERS, counts, ReplayRules(predictor="mean")))
    seats, _ = plan_placements(
        counts[0], even_owners(LAYERS, POOL, EXPERTS), **POOL.sizes(), planner="moetrain", slots=2, seed=1
    )
    measure_L4 = measure_placements(counts[1], even_owners(LAYERS, POOL, EXPERTS), seats, **POOL.sizes())
    mean_L = counts[1].sum((1, 2)).double() / POOL.num_groups
    assert found["moetrain"].load_next == pytest.approx(float((measure_L4[:, 0] / mean_L).mean()), rel=1e-9)
    assert found["moetrain"].step_s == pytest.approx(sum(UNMEASURED.layers_s(measure_L4)), rel=1e-9)
    assert found["moetrain"].load_next > found["moetrain"].load_given + 0.2
    off = float((counts[0] - counts[1]).abs().sum() / counts[1].sum())
    assert found["moetrain"].prediction_error == pytest.approx(off, rel=1e-6)


def test_looking_ahead_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same replay with a predictor that has seen the step that it predicts."""
    counts = torch.cat([steady(1), steady(1).flip(-1)])
    honest = by_name(replay(SETUP, PLANNERS, counts))["moetrain"]

    class Prophet:
        error = 0.0

        def predict(self) -> Tensor:
            return counts[1]

        def observe(self, count_LNE: Tensor) -> None: ...

    monkeypatch.setattr(replay_module, "make_predictor", lambda *sizes: Prophet())
    assert by_name(replay(SETUP, PLANNERS, counts))["moetrain"].load_next < honest.load_next - 0.2


def test_exposed_weights_count_in_the_modelled_step() -> None:
    costly = StepCosts(1e-6, 1e-7, 1e-6, weight_byte_s=1.0, expert_bytes=1.0, overlap_s=0.0)
    found = by_name(replay(replace(SETUP, costs=costly), PLANNERS, steady(3)))
    assert found["full"].step_ratio > 100
    for planner in ("static", "hecate", "moetrain"):
        assert (found[planner].step_ratio, found[planner].replicas) == (1, 0), "nothing is held that does not pay"


def test_owners_move_only_where_told() -> None:
    """Owners of two hot experts are together at first."""
    counts = torch.ones(6, 1, 2, EXPERTS)
    counts[..., :2] = 500
    setup = replace(SETUP, slots=0)
    still, moved = (replay(setup, ["moetrain"], counts, ReplayRules(move_owners_every=every))[0] for every in (0, 2))
    assert (still.owner_moves, moved.owner_moves > 0) == (0, True)
    assert moved.load_next < still.load_next


def test_sources_become_nodes() -> None:
    count = torch.arange(2 * 1 * 4 * 3, dtype=torch.int32).view(2, 1, 4, 3)
    halves = counts_per_node(count, 2)
    assert halves[0, 0].tolist() == [[0 + 3, 1 + 4, 2 + 5], [6 + 9, 7 + 10, 8 + 11]]
    spread = counts_per_node(count, 8)
    assert spread.shape == (2, 1, 8, 3)
    assert spread[1, 0, 2:4].tolist() == [[7.5, 8.0, 8.5]] * 2
    assert torch.equal(spread.sum(2), count.sum(2).float())
    for nodes in (3, 6):
        with pytest.raises(ValueError, match="must divide"):
            counts_per_node(count, nodes)


def test_too_short_and_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="more steps than the 1 that nothing is planned for, got 1; record a longer"):
        replay(SETUP, PLANNERS, steady(1))
    with pytest.raises(ValueError, match=r"\[steps, layers, nodes, experts\] = \[S, L, 2, 16\], got \[3, 3, 2, 15\]"):
        replay(SETUP, PLANNERS, steady(3)[..., 1:])
    with pytest.raises(ValueError, match="did you mean 'hecate'"):
        replay(SETUP, ["hecat"], steady(3))
    with pytest.raises(ValueError, match="warm_up must be at least 1, got 0"):
        ReplayRules(warm_up=0)


def test_a_layer_without_pairs_is_balanced() -> None:
    counts = steady(3).clone()
    whole = by_name(replay(SETUP, PLANNERS, counts[:, :1]))["static"].load_next
    counts[:, 1:] = 0
    found = by_name(replay(SETUP, PLANNERS, counts))["static"].load_next
    assert found == pytest.approx((whole + 2) / 3, rel=1e-9)
