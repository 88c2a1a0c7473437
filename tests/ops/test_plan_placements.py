import hashlib
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.planner_cases import Pool, even_owners, seats_of, shares_of, skewed_counts, told_measure
from torch import Tensor

from moetrain.cost.step_costs import UNMEASURED, StepCosts
from moetrain.ops import PlannedSeats, measure_placements, plan_placements
from moetrain.ops.native import OPS

PLANNERS = ("static", "full", "random", "hecate", "moetrain")
POOL = Pool(16, 4)


def gap(count_LNE: Tensor, measure_L4: Tensor, pool: Pool) -> float:
    """Worst over layers: pairs of the worst group over the mean."""
    return float((measure_L4[:, 0] * pool.num_groups / count_LNE.double().sum((1, 2))).max())


@given(
    st.integers(0, 10**6), st.sampled_from(PLANNERS), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.data()
)
@settings(deadline=None, max_examples=60)
def test_plans_keep_the_rules_and_are_measured_as_told(
    seed: int, planner: str, num_nodes: int, per_node: int, num_experts: int, data: st.DataObject
) -> None:
    pool = Pool(num_nodes * per_node, per_node)
    slots = data.draw(st.integers(0, num_experts))
    random = torch.Generator().manual_seed(seed)
    count_LNE = torch.randint(0, 50, (2, num_nodes, num_experts), generator=random).float()
    owner_LE = torch.randint(0, pool.num_groups, (2, num_experts), generator=random).int()
    seats, measure_L4 = plan_placements(
        count_LNE, owner_LE, **pool.sizes(), planner=planner, slots=slots, seed=seed, costs=UNMEASURED
    )
    for layer in range(2):
        owners, held = owner_LE[layer].tolist(), seats_of(seats, layer)
        for owner, holders in zip(owners, held, strict=True):
            assert list(holders) == sorted(holders)
            assert owner in holders
            for source in range(pool.num_groups):
                shares = shares_of(holders, seats.affinity_L3[layer].tolist(), source, pool)
                assert 0 < sum(shares.values()) <= 2**24
        if planner != "full":
            for group in range(pool.num_groups):
                holds = sum(group in holders for holders in held)
                assert holds - owners.count(group) <= slots
        told = told_measure(count_LNE[layer], owners, seats, layer, pool)
        assert measure_L4[layer].tolist() == pytest.approx(told, abs=1e-9, rel=1e-9)
    torch.testing.assert_close(
        measure_placements(count_LNE, owner_LE, seats, **pool.sizes()), measure_L4, rtol=0, atol=0
    )


def test_loads_are_level_where_slots_allow_and_only_by_the_weights() -> None:
    count_LNE, owner_LE = skewed_counts(1, 6, POOL, 32), even_owners(6, POOL, 32)
    seats, measure_L4 = plan_placements(count_LNE, owner_LE, **POOL.sizes(), planner="moetrain", slots=2)
    assert gap(count_LNE, measure_L4, POOL) <= 1.01
    evenly = PlannedSeats(
        seats.offset_LE1, seats.holder_LZ, (seats.weight_LZ > 0).int(), torch.ones_like(seats.affinity_L3)
    )
    assert gap(count_LNE, measure_placements(count_LNE, owner_LE, evenly, **POOL.sizes()), POOL) > 1.1
    _, hecate_L4 = plan_placements(count_LNE, owner_LE, **POOL.sizes(), planner="hecate", slots=2)
    _, static_L4 = plan_placements(count_LNE, owner_LE, **POOL.sizes(), planner="static", slots=2)
    assert 1.01 < gap(count_LNE, hecate_L4, POOL) < gap(count_LNE, static_L4, POOL)
    assert bool((measure_L4[:, 2] < 0.8 * hecate_L4[:, 2]).all())  # rows between nodes


def test_many_small_groups_leave_the_large_ones_room() -> None:
    """With fewer experts than groups, an owner's small excess must not use up the slots of who has nothing."""
    pool = Pool(128, 8)
    count_LNE, owner_LE = skewed_counts(0, 2, pool, 32), even_owners(2, pool, 32)
    _, measure_L4 = plan_placements(count_LNE, owner_LE, **pool.sizes(), planner="moetrain", slots=2)
    assert gap(count_LNE, measure_L4, pool) <= 1.02


@pytest.mark.parametrize(("num_experts", "slots"), [(8, 2), (16, 2), (8, 4), (16, 4)])
def test_experts_that_gain_alike_take_turns(num_experts: int, slots: int) -> None:
    """Where all counts are equal, no expert takes the slots of a node before the others have theirs."""
    pool = Pool(32, 8)
    count_1NE = torch.full((1, pool.num_nodes, num_experts), 1024.0)
    owner_1E = even_owners(1, pool, num_experts)
    seats, _ = plan_placements(count_1NE, owner_1E, **pool.sizes(), planner="moetrain", slots=slots)
    for node in range(pool.num_nodes):
        held = [sum(pool.node_of(group) == node for group in holders) for holders in seats_of(seats, 0)]
        assert max(held) - min(held) <= 2


@pytest.mark.parametrize("planner", ["static", "hecate", "moetrain"])
def test_plans_follow_a_permutation_of_the_experts(planner: str) -> None:
    """The experts' numbers mean nothing; loads differ, so that no tie hangs on them."""
    count_LNE, owner_LE = skewed_counts(2, 3, POOL, 24), even_owners(3, POOL, 24)
    order_E = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    plain, plain_L4 = plan_placements(count_LNE, owner_LE, **POOL.sizes(), planner=planner, slots=2)
    moved, moved_L4 = plan_placements(
        count_LNE[..., order_E].contiguous(),
        owner_LE[:, order_E].contiguous(),
        **POOL.sizes(),
        planner=planner,
        slots=2,
    )
    torch.testing.assert_close(moved_L4, plain_L4, rtol=0.01, atol=0)  # sums run in another order
    for layer in range(3):
        before = [list(holders) for holders in seats_of(plain, layer)]
        after = [list(holders) for holders in seats_of(moved, layer)]
        assert after == [before[expert] for expert in order_E.tolist()]
        assert planner == "static" or after != before  # else the order would not matter


def test_hecate_shares_slots_in_proportion_to_load() -> None:
    """8 groups on 2 nodes with a slot each: of 8 slots the two hottest of loads 6 and 2 get 6 and 2."""
    count_LNE = torch.tensor([[[1.0, 0.0, 3.0, 0.5], [1.0, 0.0, 3.0, 0.5]]])
    owner_LE = torch.tensor([[0, 2, 4, 6]], dtype=torch.int32)
    costs = StepCosts(1e-6, 0.0, 0.0, weight_byte_s=1.0, expert_bytes=1.0, overlap_s=2.0)
    seats, _ = plan_placements(
        count_LNE, owner_LE, num_groups=8, groups_per_node=4, planner="hecate", slots=1, costs=costs
    )
    held = seats_of(seats, 0)
    # Nodes with more free slots first, the lower on ties: 0, 4 is the owner so 5, 1, 6, 2, 7; then what is left.
    assert [list(holders) for holders in held] == [[0, 3, 4], [2], [0, 1, 2, 4, 5, 6, 7], [6]]
    assert {weight for holders in held for weight in holders.values()} == {1}
    assert seats.affinity_L3.tolist() == [[1, 1, 1]]


def test_hecate_gives_few_hot_experts_to_everybody() -> None:
    count_LNE = torch.tensor([[[1.0, 5.0, 3.0, 2.0]]])
    owner_LE = torch.tensor([[0, 0, 1, 2]], dtype=torch.int32)
    costs = StepCosts(1e-6, 0.0, 0.0, weight_byte_s=1.0, expert_bytes=1.0, overlap_s=2.0)
    seats, _ = plan_placements(
        count_LNE, owner_LE, num_groups=3, groups_per_node=3, planner="hecate", slots=2, costs=costs
    )
    assert [list(holders) for holders in seats_of(seats, 0)] == [[0], [0, 1, 2], [0, 1, 2], [2]]


def test_full_serves_itself_and_random_follows_its_seed() -> None:
    count_LNE, owner_LE = skewed_counts(4, 2, POOL, 8), even_owners(2, POOL, 8)
    seats, measure_L4 = plan_placements(count_LNE, owner_LE, **POOL.sizes(), planner="full", slots=0)
    assert [list(holders) for holders in seats_of(seats, 1)] == [list(range(16))] * 8
    assert measure_L4[:, 1:3].abs().max() == 0
    found = [
        plan_placements(count_LNE, owner_LE, **POOL.sizes(), planner="random", slots=3, seed=seed)[0]
        for seed in (1, 1, 2)
    ]
    assert seats_of(found[0], 0) == seats_of(found[1], 0) != seats_of(found[2], 0)
    assert seats_of(found[0], 0) != seats_of(found[0], 1)


def test_replicas_are_worth_their_exposed_weights_or_not_made() -> None:
    count_LNE, owner_LE = skewed_counts(5, 1, POOL, 32), even_owners(1, POOL, 32)

    def replicas(expert_bytes: float, overlap_s: float) -> int:
        costs = StepCosts(1e-6, 1e-7, 1e-6, weight_byte_s=1e-9, expert_bytes=expert_bytes, overlap_s=overlap_s)
        _, measure_L4 = plan_placements(count_LNE, owner_LE, **POOL.sizes(), planner="moetrain", slots=3, costs=costs)
        return int(measure_L4[0, 3])

    assert replicas(1e6, 1.0) == 3  # all hidden
    assert replicas(1e9, 0.0) == 0  # a second each, to save milliseconds
    assert replicas(1e5, 0.0) == 3  # 0.1 ms each, worth it though nothing hides them
    assert replicas(1e9, 2.5) == 2  # two are hidden, the third would not be


def test_layers_without_tokens_keep_their_owners() -> None:
    owner_LE = even_owners(1, POOL, 8)
    for planner in ("hecate", "moetrain"):
        seats, measure_L4 = plan_placements(
            torch.zeros(1, POOL.num_nodes, 8), owner_LE, **POOL.sizes(), planner=planner, slots=2
        )
        assert [list(holders) for holders in seats_of(seats, 0)] == [[owner] for owner in owner_LE[0].tolist()]
        assert measure_L4.tolist() == [[0.0] * 4]


def test_other_threads_of_python_run_meanwhile() -> None:
    pool = Pool(256, 8)
    count_LNE, owner_LE = skewed_counts(6, 40, pool, 128), even_owners(40, pool, 128)
    inside, turns = threading.Event(), 0

    def plan() -> None:
        inside.set()
        plan_placements(count_LNE, owner_LE, **pool.sizes(), planner="moetrain", slots=2)
        inside.clear()

    planning = threading.Thread(target=plan)
    planning.start()
    while planning.is_alive():
        turns += inside.is_set()  # with the lock held nobody could look
    assert turns > 1000


def test_all_machines_plan_alike() -> None:
    """What decides is arithmetic that IEEE 754 fixes: the same plans wherever this runs."""
    state, numbers = 1, []
    for _ in range(4 * 24):
        state = state * 1103515245 % 2**31
        numbers.append(state // 2**16 % 1000 + (state // 2**26) ** 2)
    count_1NE = torch.tensor(numbers, dtype=torch.float32).view(1, 4, 24)
    found = {}
    for planner in ("random", "hecate", "moetrain"):
        seats, _ = plan_placements(count_1NE, even_owners(1, POOL, 24), **POOL.sizes(), planner=planner, slots=2)
        lists = (seats.offset_LE1, seats.holder_LZ, seats.weight_LZ, seats.affinity_L3)
        found[planner] = hashlib.sha256(b"".join(one.numpy().tobytes() for one in lists)).hexdigest()[:16]
    assert found == {"random": "fd7a67fd798e43c2", "hecate": "b96e557bcde87689", "moetrain": "7f18ff6a5afefcf6"}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"slots": -1}, ValueError, r"slots must be between 0 and the number of experts, 8, got -1"),
        ({"slots": 9}, ValueError, r"slots must be between 0 and the number of experts, 8, got 9"),
        ({"planner": "moetrian"}, ValueError, r"planner must be static, full, .* or moetrain, got moetrian"),
        ({"num_groups": 0}, ValueError, r"num_groups must be at least 1, got 0"),
        ({"groups_per_node": 3}, ValueError, r"groups_per_node must divide num_groups = 16, got 3"),
        ({"groups_per_node": 2}, ValueError, r"count must be \[L, N, E\] with N = .* = 8 .*got \[1, 4, 8\]"),
        ({"count_LNE": torch.ones(1, 4, 8, dtype=torch.float64)}, TypeError, r"count must be Float"),
        ({"count_LNE": torch.full((1, 4, 8), -1.0)}, ValueError, r"at least 0, got -1 for layer 0, node 0, expert 0"),
        ({"count_LNE": torch.full((1, 4, 8), torch.nan)}, ValueError, r"counts must be finite.*got nan"),
        ({"count_LNE": torch.full((1, 4, 8), torch.inf)}, ValueError, r"counts must be finite.*got inf"),
        ({"owner_LE": torch.full((1, 8), 16, dtype=torch.int32)}, ValueError, r"groups below 16, got 16 for layer 0"),
        ({"owner_LE": torch.zeros(1, 7, dtype=torch.int32)}, ValueError, r"owner must be \[L, E\] = \[1, 8\]"),
        ({"owner_LE": torch.zeros(1, 8)}, TypeError, r"owner must be Int"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    good: dict[str, Any] = {"count_LNE": torch.ones(1, 4, 8), "owner_LE": even_owners(1, POOL, 8)}
    good |= {"planner": "moetrain", "slots": 1, **POOL.sizes()}
    plan_placements(**good)
    with pytest.raises(error, match=text):
        plan_placements(**(good | change))


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("offset_LE1", [[1, 2]], r"offsets must begin at 0 and end at most at 2, got 1 and 2"),
        ("offset_LE1", [[0, 3]], r"got 0 and 3 for layer 0"),
        ("holder_LZ", [[1, 1]], r"ascending groups below 2 .*got holder 1 with weight 1 for layer 0, expert 0"),
        ("holder_LZ", [[0, 2]], r"got holder 2"),
        ("weight_LZ", [[0, 0]], r"some holder of each expert must have a weight"),
        ("weight_LZ", [[2, -1]], r"with weight -1"),
        ("affinity_L3", [[1, -1, 1]], r"affinities must be at least 0, got 1, -1 and 1"),
        ("affinity_L3", [[1, 1]], r"affinity must be \[L, 3\]"),
    ],
)
def test_seats_that_cannot_be_are_named(name: str, values: list[list[int]], text: str) -> None:
    lists = {"offset_LE1": [[0, 2]], "holder_LZ": [[0, 1]], "weight_LZ": [[1, 1]], "affinity_L3": [[1, 1, 1]]}
    count_LNE, owner_LE = torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.int32)

    def measured(lists: dict[str, list[list[int]]]) -> Tensor:
        seats = PlannedSeats(**{key: torch.tensor(value, dtype=torch.int32) for key, value in lists.items()})
        return measure_placements(count_LNE, owner_LE, seats, num_groups=2, groups_per_node=2)

    assert measured(lists).tolist() == [[0.5, 0.25, 0.0, 1.0]]
    with pytest.raises(ValueError, match=text):
        measured(lists | {name: values})


def test_registration() -> None:
    lists = (skewed_counts(0, 2, POOL, 8), even_owners(2, POOL, 8))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for planner in PLANNERS:
        options = (16, 4, planner, 2, 3, 1, 1e-6, 1e-7, 1e-6, 0.0, 0.0)
        torch.library.opcheck(OPS.plan_placements.default, (*lists, *options), test_utils=checks)
    seats, _ = plan_placements(*lists, **POOL.sizes(), planner="hecate", slots=2)
    found = (seats.offset_LE1, seats.holder_LZ, seats.weight_LZ, seats.affinity_L3)
    torch.library.opcheck(OPS.measure_placements.default, (*lists, 16, 4, *found), test_utils=checks)
