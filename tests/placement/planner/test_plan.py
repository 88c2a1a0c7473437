import dataclasses
from typing import Any

import pytest
import torch
from ops.planner_cases import Pool, even_owners, skewed_counts

from moetrain.cost.step_costs import UNMEASURED
from moetrain.ops import plan_placements
from moetrain.placement.planner.plan import PLANNERS, PlannerSetup, modelled_seconds, plan_layers

POOL = Pool(8, 4)
SETUP = PlannerSetup("moetrain", num_experts=16, num_groups=8, groups_per_node=4, slots=2, costs=UNMEASURED)
COUNTS, OWNERS = skewed_counts(0, 3, POOL, 16), even_owners(3, POOL, 16)


def test_layers_are_what_the_operator_plans_without_tails() -> None:
    layers, seconds = plan_layers(SETUP, COUNTS, OWNERS)
    seats, measure_L4 = plan_placements(COUNTS, OWNERS, **POOL.sizes(), planner="moetrain", slots=2)
    assert seconds == UNMEASURED.layers_s(measure_L4) == modelled_seconds(SETUP, COUNTS, OWNERS, seats)
    for layer, found in enumerate(layers):
        end = int(found.offset_E1[-1])
        assert len(found.holder_Z) == len(found.weight_Z) == end
        assert torch.equal(found.holder_Z, seats.holder_LZ[layer, :end])
        assert torch.equal(found.weight_Z, seats.weight_LZ[layer, :end])
        assert list(found.affinity) == seats.affinity_L3[layer].tolist()
        assert found.owner_ES[:, 0].tolist() == OWNERS[layer].tolist()
        assert (found.domain_size, found.num_shards) == (4, 1)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("seed", range(4))
def test_every_plan_makes_placements(planner: str, seed: int) -> None:
    setup = dataclasses.replace(SETUP, planner=planner, seed=seed, num_shards=2)
    layers, _ = plan_layers(setup, COUNTS, OWNERS)
    assert [placement.num_ranks for placement in layers] == [16] * 3


def test_plans_for_other_counts_are_modelled_as_slower() -> None:
    seats, _ = plan_placements(COUNTS, OWNERS, **POOL.sizes(), planner="moetrain", slots=2)
    shifted = COUNTS.roll(5, dims=2).contiguous()
    stale = modelled_seconds(SETUP, shifted, OWNERS, seats)
    _, fresh = plan_layers(SETUP, shifted, OWNERS)
    assert all(old > 1.1 * new for old, new in zip(stale, fresh, strict=True))


def test_random_draws_anew_each_step_and_others_do_not() -> None:
    drawn = dataclasses.replace(SETUP, planner="random")
    holders = [plan_layers(drawn, COUNTS, OWNERS, step=step)[0][0].holder_Z.tolist() for step in (0, 0, 1)]
    assert holders[0] == holders[1] != holders[2]
    weights = [plan_layers(SETUP, COUNTS, OWNERS, step=step)[0][0].weight_Z.tolist() for step in (0, 1)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"planner": "hecat"}, r"placement\.planner must be one of .*, got 'hecat'; did you mean 'hecate'\?"),
        ({"slots": -1}, r"placement\.slots must be at least 0, got -1; set it to 0 to hold no replicas"),
        ({"slots": 17}, r"placement\.slots \(17\) must be at most the number of experts \(16\).*set it to 16 or less"),
        ({"groups_per_node": 3}, r"groups of a node \(3\) must divide groups of the expert pool \(8\); set .* 2, 4"),
        ({"num_groups": 0}, r"groups of the expert pool must be at least 1, got 0"),
    ],
)
def test_setups_that_cannot_be_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(SETUP, **change)


def test_counts_of_another_pool_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts must be .* = \[L, 2, 16\], got \[3, 8, 16\]; sum the groups"):
        plan_layers(SETUP, torch.ones(3, 8, 16), OWNERS)
