"""Plans of sequences: legal, as short as they say, no shorter than the bound, and refused where nothing fits."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.sequence import largest_share_up_to
from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES, PassCosts, SequenceCosts
from moetrain.ops import PlannedSequences, plan_sequences
from moetrain.sequence.lengths import SHARES, draw_lengths
from moetrain.sequence.zigzag import Zigzag

PLANNERS = ("data", "context", "bytescale", "moetrain")
FREE = SequenceCosts(PassCosts(square_ms=1e-4, token_ms=1e-2), PassCosts(square_ms=2e-4, token_ms=2e-2))
MESSAGES = SequenceCosts(
    PassCosts(square_ms=1e-4, token_ms=1e-2, hop_ms=0.2, hop_token_ms=2e-3),
    PassCosts(square_ms=2e-4, token_ms=2e-2, hop_ms=0.4, hop_token_ms=6e-3),
)
K, M = 1 << 10, 1 << 20


def plan(lengths: Any, planner: str = "moetrain", **given: Any) -> PlannedSequences:
    options = {"num_ranks": 4, "block": 1, "capacity": 64, **given}
    return plan_sequences(
        torch.tensor(np.array(lengths, np.int64).tolist(), dtype=torch.int64), planner=planner, **options
    )


def items_of(found: PlannedSequences) -> list[tuple[int, list[int], list[int], float]]:
    """Round, sequences, ranks and time of each item."""
    of_members = zip(found.offset_I1.tolist(), found.offset_I1[1:].tolist(), strict=False)
    of_ranks = zip(found.rank_offset_I1.tolist(), found.rank_offset_I1[1:].tolist(), strict=False)
    return [
        (round_idx, found.member_N[slice(*members)].tolist(), found.rank_M[slice(*ranks)].tolist(), ms)
        for round_idx, members, ranks, ms in zip(
            found.round_I.tolist(), of_members, of_ranks, found.est_ms_I.tolist(), strict=True
        )
    ]


def joined(found: PlannedSequences, num_ranks: int, block: int, *, equal: bool) -> list[set[int]]:
    """Blocks that gangs join, told apart."""
    sets = [{b} for b in range(num_ranks // block)]
    groups = [{rank // block for rank in ranks} for _, _, ranks, _ in items_of(found)]
    for group in [*groups, *([set(range(num_ranks // block))] if equal else [])]:
        touched = [one for one in sets if one & group]
        sets = [one for one in sets if not one & group] + [set().union(*touched)]
    return sets


def by_formula(lengths: list[int], d: int, costs: SequenceCosts) -> float:
    """What an item takes, written again."""
    tokens, ms = sum(lengths), 0.0
    for one in (costs.forward, costs.backward):
        attention = one.square_ms * sum(n**2 for n in lengths) / d
        messages = one.hop_ms * (d - 1) + one.hop_token_ms * tokens * (d - 1) / d
        ms += (attention if attention > messages else messages) + one.token_ms * tokens / d + one.item_ms
    return ms


def check(found: PlannedSequences, lengths: list[int], costs: SequenceCosts, **given: Any) -> None:
    """By rules written again, in plain Python."""
    num_ranks, block, capacity = given["num_ranks"], given["block"], given["capacity"]
    items, rounds = items_of(found), found.rounds_R.tolist()
    assert sorted(i for _, members, _, _ in items for i in members) == list(range(len(lengths)))
    last = [-1] * num_ranks
    for round_idx, members, ranks, ms in items:
        assert ranks == sorted(set(ranks))
        parts = Zigzag([lengths[i] for i in members], len(ranks))
        assert max(parts.size(place) for place in range(len(ranks))) <= capacity
        for rank in ranks:
            assert last[rank] < round_idx < rounds[rank]
            last[rank] = round_idx
        assert ms == pytest.approx(by_formula([lengths[i] for i in members], len(ranks), costs), rel=1e-9)
    makespan = 0.0
    for blocks in joined(found, num_ranks, block, equal=given["equal_rounds"]):
        lanes = [rank for b in blocks for rank in range(b * block, (b + 1) * block)]
        assert len({rounds[lane] for lane in lanes}) == 1
        longest = [0.0] * rounds[lanes[0]]
        for round_idx, _, ranks, ms in items:
            if ranks[0] in lanes:
                longest[round_idx] = max(longest[round_idx], ms)
        makespan = max(makespan, sum(longest))
    assert found.est_makespan_ms == pytest.approx(makespan, rel=1e-9)
    assert found.est_makespan_ms >= found.lower_bound_ms * (1 - 1e-9)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PLANNERS),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 10**6),
    st.sampled_from([FREE, MESSAGES, UNMEASURED_SEQUENCES]),
)
def test_plans_keep_the_rules_and_take_as_long_as_they_say(
    planner: str, blocks: int, block: int, capacity: int, equal: bool, seed: int, costs: SequenceCosts
) -> None:
    rng = np.random.default_rng(seed)
    num_ranks = blocks * block
    gang = int(rng.choice([d for d in range(1, num_ranks + 1) if num_ranks % d == 0]))
    most = {"data": 1, "context": gang}.get(planner, num_ranks)
    longest = max(n for n in range(1, most * capacity + 1) if largest_share_up_to(n, most) <= capacity)
    lengths = [int(n) for n in np.exp(rng.uniform(0, np.log(longest), rng.integers(0, 30)))]
    lengths += [longest] * int(rng.integers(0, 3))  # that only just fit
    given = {"num_ranks": num_ranks, "block": block, "capacity": capacity, "equal_rounds": equal}
    found = plan(lengths, planner, gang=gang, costs=costs, **given)
    check(found, lengths, costs, **given)
    again = plan(lengths, planner, gang=gang, costs=costs, **given)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(found), _tensors(again), strict=True))


def _tensors(found: PlannedSequences) -> tuple[torch.Tensor, ...]:
    return found.round_I, found.offset_I1, found.member_N, found.rank_offset_I1, found.rank_M, found.rounds_R


def best_of_all(lengths: list[int], num_ranks: int, costs: SequenceCosts) -> float:
    """The least makespan where ranks run freely and need not even be free at once: any choice of ranks and widths.

    Sequences of the same ranks are one item, with one ring.
    """
    best = np.inf
    choices = [c for d in range(1, num_ranks + 1) for c in itertools.combinations(range(num_ranks), d)]
    for chosen in itertools.product(choices, repeat=len(lengths)):
        load = [0.0] * num_ranks
        for ranks in set(chosen):
            members = [n for n, of in zip(lengths, chosen, strict=True) if of == ranks]
            for rank in ranks:
                load[rank] += by_formula(members, len(ranks), costs)
        best = min(best, max(load))
    return best


@pytest.mark.parametrize("costs", [FREE, MESSAGES])
@pytest.mark.parametrize("lengths", [[9], [30, 2], [17, 16, 5], [40, 3, 3], [8, 8, 8], [150], [190, 120]])
def test_no_plan_is_shorter_than_the_bound(lengths: list[int], costs: SequenceCosts) -> None:
    found = plan(lengths, num_ranks=3, costs=costs)
    assert found.lower_bound_ms <= best_of_all(lengths, 3, costs) * (1 + 1e-9)
    assert found.lower_bound_ms >= sum(costs.ms(n) for n in lengths) / 3 * (1 - 1e-9)


@pytest.mark.parametrize("name", sorted(SHARES))
def test_work_is_level_where_all_ranks_share_rounds(name: str) -> None:
    """As they do where parameters are gathered in each round."""
    over = []
    for seed in range(5):
        lengths = draw_lengths(name, 2 * M, 128 * K, seed=seed)
        found = plan(lengths, num_ranks=256, block=8, capacity=8 * K, equal_rounds=True)
        over.append(found.est_makespan_ms / found.lower_bound_ms)
    assert np.mean(over) <= 1.15
    assert max(over) <= 1.2


@pytest.mark.parametrize(("lengths", "best_ms"), [([32768, 15258, 10882, 5127, 640, 420, 220, 134, 87], 12.79)])
def test_few_ranks_are_dealt_out_about_as_well_as_they_can_be(lengths: list[int], best_ms: float) -> None:
    """The least time of eight ranks is that of CP-SAT 9.15 (OR-tools), in which no rounds hold ranks back."""
    costs = SequenceCosts(
        *(replace(one, item_ms=0.0) for one in (UNMEASURED_SEQUENCES.forward, UNMEASURED_SEQUENCES.backward))
    )
    found = plan(lengths, num_ranks=8, capacity=8 * K, costs=costs)
    assert best_ms * 0.999 <= found.est_makespan_ms <= 1.05 * best_ms


@pytest.mark.parametrize("block", [1, 8, 64])
@pytest.mark.parametrize("name", sorted(SHARES))
def test_work_is_level_on_a_thousand_ranks(name: str, block: int) -> None:
    """Beside the least that any plan takes; ByteScale's fewest ranks and gangs of one size are far from it."""
    lengths = draw_lengths(name, 32 * M, 2 * M, seed=1)
    given: dict[str, Any] = {"num_ranks": 1024, "block": block, "capacity": 8 * K}
    found = plan(lengths, **given)
    assert found.est_makespan_ms <= 1.05 * found.lower_bound_ms
    fewest = plan(lengths, "bytescale", **given)
    assert fewest.est_makespan_ms > 1.4 * found.est_makespan_ms
    assert plan(lengths, "context", gang=256, **given).est_makespan_ms > 1.4 * found.est_makespan_ms


def test_five_giants_do_not_wait_for_one_another() -> None:
    found = plan([2 * M] * 5, num_ranks=1024, block=8, capacity=16 * K)
    assert found.est_makespan_ms <= 1.05 * found.lower_bound_ms


def test_data_fills_ranks_in_order() -> None:
    found = plan([30, 30, 5, 40, 20], "data", num_ranks=2, capacity=64)
    assert [(r, m, ranks) for r, m, ranks, _ in items_of(found)] == [(0, [0, 1], [0]), (0, [2, 3], [1]), (1, [4], [0])]
    assert found.rounds_R.tolist() == [2, 1]
    assert plan([30, 30, 5, 40, 20], "data", num_ranks=2, capacity=64, equal_rounds=True).rounds_R.tolist() == [2, 2]


def test_context_fills_gangs_in_order() -> None:
    found = plan([60, 60, 9], "context", num_ranks=4, capacity=64, gang=2)
    assert [(r, m, ranks) for r, m, ranks, _ in items_of(found)] == [(0, [0, 1], [0, 1]), (0, [2], [2, 3])]


def test_nothing_is_a_plan() -> None:
    for planner in PLANNERS:
        found = plan([], planner, num_ranks=3)
        assert found.rounds_R.tolist() == [1, 1, 1]
        assert (len(found.round_I), found.est_makespan_ms, found.lower_bound_ms) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            {"lengths": [300]},
            ValueError,
            r"sequence 0 has 300 tokens, but the 4 rank\(s\) .* 64 each",
        ),
        ({"lengths": [9, 65], "planner": "data"}, ValueError, r"sequence 1 has 65 tokens, but the 1 rank\(s\)"),
        (
            {"lengths": [9, 130], "planner": "context", "gang": 2},
            ValueError,
            r"the 2 rank\(s\) that may share it",
        ),
        ({"planner": "hdp"}, ValueError, "planner must be data, context, bytescale or moetrain, got hdp"),
        ({"block": 3}, ValueError, "block must divide num_ranks = 4, got 3"),
        ({"gang": 3, "planner": "context"}, ValueError, "gang must divide num_ranks = 4, got 3"),
        ({"num_ranks": 0}, ValueError, "num_ranks must be at least 1, got 0"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"lengths": [3, 0]}, ValueError, "sequences must have at least 1 token, got 0 for sequence 1"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan(**{"lengths": [9, 3], **given})
    with pytest.raises(TypeError, match="num_tokens must be Long"):
        plan_sequences(torch.tensor([3], dtype=torch.int32), planner="data", num_ranks=1, block=1, capacity=9)


def test_costs_are_numbers() -> None:
    with pytest.raises(ValueError, match=r"PassCosts.hop_ms must be finite and at least 0, got -1.0; measure again"):
        PassCosts(square_ms=1.0, token_ms=1.0, hop_ms=-1.0)
    assert SequenceCosts.from_json(UNMEASURED_SEQUENCES.to_json()) == UNMEASURED_SEQUENCES
    with pytest.raises(ValueError, match="costs of sequences must have forward and backward"):
        SequenceCosts.from_json({"forward": {"square_ms": 1.0, "token_ms": 1.0}})


@pytest.mark.parametrize("name", sorted(SHARES))
def test_drawn_lengths_have_the_shares_of_tokens(name: str) -> None:
    lengths = draw_lengths(name, 256 * M, 8 * M, seed=3)
    assert int(lengths.sum()) == 256 * M
    assert int(lengths.min()) >= 1
    edges = 4096 * 2 ** np.arange(len(SHARES[name]))
    tokens = np.bincount(np.searchsorted(edges, lengths), weights=lengths, minlength=len(edges))[: len(edges)]
    assert 100 * tokens / tokens.sum() == pytest.approx(SHARES[name], abs=5.0)
    cut = draw_lengths(name, 8 * M, 64 * K, seed=3, scale=4)
    assert int(cut.max()) <= 64 * K
    assert draw_lengths(name, 8 * M, 64 * K, seed=3, scale=4).tolist() == cut.tolist()
