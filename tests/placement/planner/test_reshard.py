import dataclasses

import pytest
import torch
from ops.planner_cases import Pool, even_owners, skewed_counts
from torch import Tensor

from moetrain.cost.step_costs import StepCosts
from moetrain.ops import reshard_owners
from moetrain.ops.native import OPS
from moetrain.placement.planner.plan import PlannerSetup
from moetrain.placement.planner.reshard import layers_that_pay, move_owners

POOL = Pool(8, 4)
COSTS = StepCosts(1e-6, 1e-7, 1e-6, weight_byte_s=1e-9, expert_bytes=1e6, overlap_s=1.0)
SETUP = PlannerSetup("static", num_experts=16, num_groups=8, groups_per_node=4, slots=0, costs=COSTS)


def worst_loads(count_LNE: Tensor, owner_LE: Tensor) -> Tensor:
    """[L]: pairs of the group whose experts are chosen most."""
    load_LG = torch.zeros(len(owner_LE), 8)
    return load_LG.scatter_add_(1, owner_LE.long(), count_LNE.sum(1)).amax(1)


def test_loads_are_spread_within_the_room_of_all_layers() -> None:
    count_LNE, owner_LE = skewed_counts(0, 6, POOL, 16), even_owners(6, POOL, 16)
    new_LE = reshard_owners(count_LNE, owner_LE, **POOL.sizes(), num_hot=0)
    assert torch.bincount(new_LE.flatten()).tolist() == [12] * 8
    assert worst_loads(count_LNE, new_LE).sum() < 0.81 * worst_loads(count_LNE, owner_LE).sum()
    assert int((new_LE != owner_LE).sum()) < 60  # of 96; a spread that looks at no owner moves seven of eight


def test_hot_experts_fill_the_room_that_others_leave() -> None:
    """Without the 9, 5 stands against 4 + 1 on two groups with room for two each, and the 9 goes where room is left."""
    count_LNE = torch.tensor([[[9.0, 5.0, 4.0, 1.0]]])
    owner_LE = torch.tensor([[0, 0, 0, 1]], dtype=torch.int32)
    sizes = {"num_groups": 2, "groups_per_node": 2}
    assert reshard_owners(count_LNE, owner_LE, **sizes, num_hot=1).tolist() == [[0, 0, 1, 1]]
    assert reshard_owners(count_LNE, owner_LE, **sizes, num_hot=0).tolist() == [[0, 1, 1, 0]]


def test_owners_of_even_loads_stay() -> None:
    owner_LE = even_owners(3, POOL, 16)
    assert torch.equal(reshard_owners(torch.ones(3, 2, 16), owner_LE, **POOL.sizes(), num_hot=0), owner_LE)


def test_owners_move_where_it_pays() -> None:
    count_LNE, owner_LE = skewed_counts(1, 2, POOL, 16), even_owners(2, POOL, 16)
    paid = move_owners(SETUP, count_LNE, owner_LE, interval_steps=100, state_bytes=1e6)
    assert paid.num_moves == int((paid.owner_LE != owner_LE).sum()) > 0
    assert paid.gain_s > paid.cost_s == pytest.approx(paid.num_moves * 1e-3)
    saved = float((worst_loads(count_LNE, owner_LE) - worst_loads(count_LNE, paid.owner_LE)).sum())
    assert paid.gain_s > 100 * 1e-6 * saved * 0.5
    dear = move_owners(SETUP, count_LNE, owner_LE, interval_steps=100, state_bytes=1e12)
    assert (dear.num_moves, dear.gain_s, dear.cost_s) == (0, 0.0, 0.0)
    assert torch.equal(dear.owner_LE, owner_LE)


@pytest.mark.parametrize(
    ("new", "net", "moving"),
    [
        ([[1, 0], [1, 0]], [3.0, -1.0], [True, False]),  # swaps leave the room as it is
        ([[0, 0], [1, 1]], [3.0, -1.0], [True, True]),  # each alone would overfill a group
        ([[0, 0], [1, 1]], [1.0, -3.0], [False, False]),
        ([[1, 0], [1, 0]], [-1.0, 0.0], [False, False]),
    ],
)
def test_a_layer_that_loses_moves_only_to_make_room(new: list[list[int]], net: list[float], moving: list[bool]) -> None:
    owner_LE = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    found = layers_that_pay(torch.tensor(net), owner_LE, torch.tensor(new, dtype=torch.int32), num_groups=2)
    assert found.tolist() == moving


def test_what_full_plans_gain_nothing_by_is_not_moved() -> None:
    """Everybody computes its own tokens whoever owns the experts."""
    full = dataclasses.replace(SETUP, planner="full")
    count_LNE, owner_LE = skewed_counts(2, 2, POOL, 16), even_owners(2, POOL, 16)
    assert move_owners(full, count_LNE, owner_LE, interval_steps=100, state_bytes=1.0).num_moves == 0


def test_bad_input_is_named() -> None:
    count_LNE, owner_LE = skewed_counts(0, 1, POOL, 16), even_owners(1, POOL, 16)
    with pytest.raises(ValueError, match=r"num_hot must be between 0 and the number of experts, 16, got 17"):
        reshard_owners(count_LNE, owner_LE, **POOL.sizes(), num_hot=17)
    with pytest.raises(ValueError, match=r"placement\.move_owners_every must be at least 1, got 0"):
        move_owners(SETUP, count_LNE, owner_LE, interval_steps=0, state_bytes=1.0)
    count_LNE[0, 1, 2] = -3
    with pytest.raises(ValueError, match=r"got -3 for layer 0, node 1, expert 2"):
        reshard_owners(count_LNE, owner_LE, **POOL.sizes(), num_hot=1)


def test_registration() -> None:
    inputs = (skewed_counts(0, 2, POOL, 16), even_owners(2, POOL, 16), 8, 4, 3)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OPS.reshard_owners.default, inputs, test_utils=checks)
