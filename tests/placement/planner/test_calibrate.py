import dataclasses

import pytest
import torch
from ops.planner_cases import Pool, even_owners, seats_of, skewed_counts, told_measure
from torch import Tensor

from moetrain.cost.step_costs import StepCosts
from moetrain.ops import PlannedSeats, plan_placements, split_placements
from moetrain.ops.native import OPS
from moetrain.placement.placement import Placement
from moetrain.placement.planner.calibrate import calibrate, most_gathered
from moetrain.placement.planner.plan import PlannerSetup, plan_layers

POOL = Pool(8, 4)
COSTS = StepCosts(1e-6, 1e-7, 3e-7, weight_byte_s=1e-9, expert_bytes=1e5, overlap_s=1.0)
SETUP = PlannerSetup("moetrain", num_experts=16, num_groups=8, groups_per_node=4, slots=2, costs=COSTS)
PLANNED, OWNERS = skewed_counts(0, 1, POOL, 16), even_owners(1, POOL, 16)


def worst(placement: Placement, count_NE: Tensor) -> float:
    """Highest load over the mean."""
    load_G = torch.zeros(8, dtype=torch.float64)
    for source in range(8):
        share_Z = placement.shares(source).double()
        total_E = torch.zeros(16, dtype=torch.float64).index_add_(0, placement.expert_Z, share_Z)
        pairs_E = count_NE[source // 4].double() / 4
        load_G.index_add_(0, placement.holder_Z, share_Z * (pairs_E / total_E)[placement.expert_Z])
    return float(load_G.max() / load_G.mean())


def current() -> Placement:
    return plan_layers(SETUP, PLANNED, OWNERS)[0][0]


def drifted() -> Tensor:
    """[N, E]: some loads up, some down, none far."""
    factor_E = torch.linspace(0.75, 1.25, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    return PLANNED[0] * factor_E


def test_loads_that_drifted_are_split_anew_where_gathering_is_dear() -> None:
    dear = dataclasses.replace(SETUP, costs=dataclasses.replace(COSTS, expert_bytes=1e10))
    before, count_NE = current(), drifted()
    after = calibrate(dear, count_NE, before)
    assert torch.equal(after.holder_Z, before.holder_Z)
    assert worst(after, count_NE) < 1.01 < worst(before, count_NE)


def test_a_shift_is_worth_new_replicas_where_gathering_is_cheap() -> None:
    before, count_NE = current(), PLANNED[0].roll(5, dims=1)
    after = calibrate(SETUP, count_NE, before)
    assert not torch.equal(after.holder_Z, before.holder_Z)
    assert worst(after, count_NE) < 1.02 < 1.3 < worst(before, count_NE)
    dear = dataclasses.replace(SETUP, costs=dataclasses.replace(COSTS, expert_bytes=1e10))
    assert torch.equal(calibrate(dear, count_NE, before).holder_Z, before.holder_Z)


def test_what_fits_stays() -> None:
    before = current()
    assert calibrate(SETUP, PLANNED[0], before) is before


def test_only_missing_experts_are_gathered() -> None:
    owners = [[0], [1], [2]]
    before = Placement.of(3, owners, [[0, 1], [1], [2]])
    after = Placement.of(3, owners, [[0, 1, 2], [1, 2], [1, 2]])
    assert most_gathered(before, after) == 2  # group 2: experts 0 and 1
    assert most_gathered(after, before) == 0


def test_split_seats_keep_their_holders_and_are_measured_as_told() -> None:
    seats, _ = plan_placements(PLANNED, OWNERS, **POOL.sizes(), planner="hecate", slots=2)
    split, measure_L4 = split_placements(PLANNED, OWNERS, seats, **POOL.sizes(), costs=COSTS)
    assert [list(holders) for holders in seats_of(split, 0)] == [list(holders) for holders in seats_of(seats, 0)]
    assert measure_L4[0].tolist() == pytest.approx(told_measure(PLANNED[0], OWNERS[0].tolist(), split, 0, POOL))
    assert float(measure_L4[0, 0]) < 1.02 * float(PLANNED.sum()) / 8
    again, _ = split_placements(PLANNED, OWNERS, split, **POOL.sizes(), costs=COSTS)
    assert torch.equal(again.weight_LZ, split.weight_LZ)  # former weights count for nothing


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"counts must be .* = \[L, 2, 16\], got \[1, 8, 16\]; sum the groups"):
        calibrate(SETUP, torch.ones(8, 16), current())
    seats, _ = plan_placements(PLANNED, OWNERS, **POOL.sizes(), planner="static", slots=0)
    wrong = PlannedSeats(seats.offset_LE1, seats.holder_LZ + 8, seats.weight_LZ, seats.affinity_L3)
    with pytest.raises(ValueError, match=r"split_placements: .* ascending groups below 8 .*got holder 8"):
        split_placements(PLANNED, OWNERS, wrong, **POOL.sizes())


def test_registration() -> None:
    seats, _ = plan_placements(PLANNED, OWNERS, **POOL.sizes(), planner="moetrain", slots=2)
    lists = (seats.offset_LE1, seats.holder_LZ, seats.weight_LZ, seats.affinity_L3)
    options = (1e-6, 1e-7, 1e-6, 0.0, 0.0)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OPS.split_placements.default, (PLANNED, OWNERS, 8, 4, *lists, *options), test_utils=checks)
