"""Shapes: T tokens, E experts, K experts per token, M rows of a tile, W ranks."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.rounding_cases import RULES, Case
from torch import Tensor

from moetrain.config.moe import RoundRule
from moetrain.ops import (
    RoundedPairs,
    counter_uniform,
    offer_pairs,
    round_pairs,
    select_experts,
)
from moetrain.ops.reference_round_pairs import rounded_rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("sizes", "tile", "options"),
    [
        ((0, 5, 2), 4, {}),
        ((1, 5, 2), 4, {}),
        ((1, 1, 1), 1, {}),
        ((300, 7, 2), 8, {}),
        ((300, 16, 3), 32, {"skew": 0.4, "valid": True}),
        ((300, 37, 5), 16, {"dtype": torch.float64, "valid": True}),
        ((200, 40, 3), 8, {"distinct": 4}),
        ((200, 6, 6), 64, {"distinct": 2}),  # all choose all: no fillers
        ((100, 20, 1), 8, {"skew": 5.0}),  # all choose one, the others are empty
    ],
    ids=str,
)
def test_same_pairs_as_the_definition(
    device: str, sizes: tuple[int, int, int], tile: int, options: dict[str, Any], rule: RoundRule
) -> None:
    case = Case(*sizes, **options, device=device)
    assert torch.equal(case.kept(tile, rule, key=11), case.expected(tile, rule, key=11))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_exchange_offers_decide_as_one_process(device: str, ranks: int, rule: RoundRule) -> None:
    for seed, distinct in ((0, None), (1, 3)):
        case = Case(250, 19, 3, seed=seed, ranks=ranks, distinct=distinct, valid=True, device=device)
        alone = Case(250, 19, 3, seed=seed, distinct=distinct, valid=True)
        kept_TE = case.kept(16, rule, key=5)
        assert torch.equal(kept_TE, alone.kept(16, rule, key=5))
        assert torch.equal(kept_TE, case.expected(16, rule, key=5))


def test_ranks_that_round_alone_would_be_noticed() -> None:
    case = Case(250, 19, 3, ranks=2)
    apart_WE = torch.arange(2, dtype=torch.int32)[:, None].expand(2, 19).contiguous()
    together_TE, apart_TE = case.kept(16, "nearest"), case.kept(16, "nearest", holder_WE=apart_WE)
    assert not torch.equal(apart_TE, together_TE)
    assert torch.equal(apart_TE, case.expected(16, "nearest", holder_WE=apart_WE))


@pytest.mark.parametrize("rule", RULES)
def test_each_holder_of_an_expert_gets_whole_tiles(device: str, rule: RoundRule) -> None:
    case = Case(400, 10, 3, ranks=4, device=device)
    holder_WE = torch.tensor([[0] * 10, [0, 1] * 5, [2] * 10, [2, 1] * 5], dtype=torch.int32)
    kept_TE = case.kept(8, rule, key=3, holder_WE=holder_WE)
    assert torch.equal(kept_TE, case.expected(8, rule, key=3, holder_WE=holder_WE))
    rank_T = torch.repeat_interleave(torch.arange(4), torch.tensor(case.cuts).diff())
    for expert in range(10):
        rows = torch.bincount(holder_WE[rank_T, expert][kept_TE[:, expert]], minlength=3)
        assert (rows % 8 == 0).all()


@given(
    num_tokens=st.integers(0, 60),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 4),
    tile=st.integers(1, 12),
    rule=st.sampled_from(RULES),
    ranks=st.integers(1, 3),
    distinct=st.sampled_from([None, 2, 5]),
    valid=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_what_holds_for_any_sizes(
    num_tokens: int, num_experts: int, top_k: int, tile: int, rule: RoundRule, ranks: int, seed: int, **options: Any
) -> None:
    case = Case(num_tokens, num_experts, min(top_k, num_experts), seed=seed, ranks=ranks, **options)
    chosen_TE, kept_TE = case.chosen_TE, case.kept(tile, rule, key=seed)
    assert torch.equal(kept_TE, case.expected(tile, rule, key=seed))
    before_E, after_E = chosen_TE.sum(0), kept_TE.sum(0)
    assert ((after_E - before_E).abs() < tile).all(), "at most one tile of deviation"
    if tile == 1:
        assert torch.equal(kept_TE, chosen_TE)
    num_valid = num_tokens if case.valid_T is None else int(case.valid_T.sum())
    assert (after_E % tile == 0).all() or num_valid < tile
    if num_valid < tile:
        assert torch.equal(kept_TE, chosen_TE), "too few tokens for a tile: left as it was"
    over_E = before_E % tile
    if rule == "balance" and ((over_E == 0) | (tile - over_E <= num_valid - before_E)).all():
        assert 2 * abs(int(after_E.sum() - before_E.sum())) <= tile, "no cell lacks fillers: half a tile in all"
    dropped_TE, added_TE = chosen_TE & ~kept_TE, kept_TE & ~chosen_TE
    assert not (dropped_TE.any(0) & added_TE.any(0)).any(), "chosen tokens outrank fillers"
    if case.valid_T is not None:
        assert not kept_TE[~case.valid_T].any()
    parts = case.rounded(tile, rule, key=seed)
    assert torch.stack([part.added_E for part in parts]).sum(0).tolist() == added_TE.sum(0).tolist()
    assert torch.stack([part.dropped_E for part in parts]).sum(0).tolist() == dropped_TE.sum(0).tolist()


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("nearest", [8, 8, 4, 4, 4]),
        ("balance", [8, 4, 8, 4, 4]),  # residual 1, then |1 - 3| = |1 + 1| goes down: -2, then 0, 0, -1
        ("up", [8, 8, 8, 4, 8]),
        ("down", [4, 4, 4, 4, 4]),
    ],
)
def test_rows_by_hand(rule: RoundRule, rows: list[int]) -> None:
    num_chosen = [7, 7, 6, 4, 5]
    surplus, found = 0, []
    for count in num_chosen:
        found.append(rounded_rows([1.0] * 20, count, 4, rule, 0.5, surplus))
        surplus += found[-1] - count
    assert found == rows


def one_expert(score_T: list[float], chosen: list[int], tile: int, rule: RoundRule, key: int = 0) -> list[int]:
    """Tokens kept, of a single expert."""
    num_tokens = len(score_T)
    gid_T2 = torch.stack((torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens)), 1)
    pairs = (
        torch.tensor(score_T)[:, None],
        torch.tensor(chosen, dtype=torch.int32),
        torch.tensor([0, len(chosen)]).int(),
    )
    rounded = round_pairs(*pairs, offer_pairs(*pairs, gid_T2, tile), tile, rule, key=key)
    return rounded.token_P[: int(rounded.offset_E1[-1])].tolist()


def test_the_lowest_chosen_go_and_the_best_fillers_come() -> None:
    score_T = [0.9, 0.1, 0.5, 0.3, 0.8, 0.2]
    assert one_expert(score_T, [1, 2, 3], 2, "down") == [2, 3]
    assert one_expert(score_T, [1, 2, 3], 2, "up") == [0, 1, 2, 3]
    assert one_expert(score_T, [1, 2, 3], 4, "nearest") == [0, 1, 2, 3]
    assert one_expert(score_T, [1, 3], 4, "nearest") == [], "halfway goes down"
    assert one_expert(score_T, [1], 4, "nearest") == []


def test_ties_between_tokens_go_to_the_lower_global_id() -> None:
    assert one_expert([0.5] * 6, [1, 2, 4], 2, "down") == [1, 2]
    assert one_expert([0.5] * 6, [1, 2, 4], 2, "up") == [0, 1, 2, 4]


def test_without_fillers_up_goes_down_and_less_than_a_tile_stays() -> None:
    score_T = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert one_expert(score_T, [0, 1, 2, 3, 4], 4, "up") == [1, 2, 3, 4]
    for rule in RULES:
        assert one_expert(score_T, [0, 1, 2], 6, rule) == [0, 1, 2]


def test_scores_that_are_no_numbers_are_never_admitted() -> None:
    assert one_expert([float("nan"), 0.2, 0.3, float("inf")], [1], 2, "up") == [1, 2]


def test_chosen_tokens_go_whatever_their_scores_are() -> None:
    score_T = [float("inf"), 0.1, float("nan"), float("-inf"), -float("nan"), 0.2]
    assert one_expert(score_T, [0, 1, 2, 3, 4], 2, "down") == [0, 1, 2, 3], "of two that are NaN, the later one"
    assert one_expert(score_T, [0, 1, 2, 3, 4], 3, "down") == [0, 1, 3]
    assert one_expert(score_T, [0], 2, "down") == []


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_gpu_writes_the_bits_of_the_cpu(rule: RoundRule) -> None:
    options: dict[str, Any] = {"ranks": 3, "valid": True, "skew": 0.05}
    for dtype, distinct in ((torch.float32, None), (torch.float64, None), (torch.float32, 3)):
        cases = [Case(5000, 70, 6, dtype=dtype, distinct=distinct, device=each, **options) for each in ("cpu", "cuda")]
        for wanted, got in zip(*(case.rounded(128, rule, key=7) for case in cases), strict=True):
            for field in dataclasses.fields(RoundedPairs):
                assert torch.equal(getattr(got, field.name), getattr(wanted, field.name)), field.name


@pytest.mark.gpu
def test_a_captured_graph_rounds_what_is_there_when_it_runs() -> None:
    first, second = (next(Case(700, 40, 4, seed=seed, valid=True, device="cuda").parts()) for seed in (0, 1))
    static = [x.clone() for x in first]

    def rounded(score_TE: Tensor, token_N: Tensor, offset_E1: Tensor, gid_T2: Tensor, valid_T: Tensor) -> RoundedPairs:
        offers = offer_pairs(score_TE, token_N, offset_E1, gid_T2, 64, valid_T=valid_T)
        return round_pairs(score_TE, token_N, offset_E1, offers, 64, "balance")

    rounded(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rounded(*static)
    for part in (second, first):
        for x, new in zip(static, part, strict=True):
            x.copy_(new)
        graph.replay()
        wanted = rounded(*part)
        for field in dataclasses.fields(RoundedPairs):
            assert torch.equal(getattr(got, field.name), getattr(wanted, field.name)), field.name


def test_sources_point_into_weights_and_scores(device: str) -> None:
    case = Case(90, 6, 2, device=device)
    (score_TE, token_N, *_), (rounded,) = next(case.parts()), case.rounded(16, "balance")
    score_TE, token_N = score_TE.cpu(), token_N.cpu()
    assert rounded.added_E.sum() > 0
    assert rounded.dropped_E.sum() > 0
    laid_out = torch.cat((-1.0 - torch.arange(len(token_N)), score_TE.flatten()))
    for expert, (start, stop) in enumerate(pairwise(rounded.offset_E1.tolist())):
        token_P, source_P = rounded.token_P[start:stop].long(), rounded.source_P[start:stop].long()
        assert (token_P.diff() > 0).all()
        is_chosen = case.chosen_TE[token_P, expert]
        assert torch.equal(token_N[source_P[is_chosen]].long(), token_P[is_chosen])
        assert torch.equal(source_P >= len(token_N), ~is_chosen)
        assert torch.equal(laid_out[source_P[~is_chosen]], score_TE[token_P[~is_chosen], expert])


def test_balance_keeps_the_total_and_up_does_not() -> None:
    case = Case(2000, 61, 4)
    total = int(case.chosen_TE.sum())
    assert abs(int(case.kept(32, "balance").sum()) - total) <= 16
    assert int(case.kept(32, "up").sum()) - total > 61 * 8


def test_balance_promises_nothing_where_cells_lack_fillers() -> None:
    """Each token chooses all experts: no rule can go up, and every expert loses its rows beyond a tile."""
    case = Case(12, 5, 5)
    assert int(case.kept(8, "balance").sum()) - int(case.chosen_TE.sum()) == -5 * 4


@pytest.mark.parametrize("rule", ["stochastic", "nearest_score"])
def test_random_rules_go_up_as_often_as_they_should(rule: RoundRule) -> None:
    """3,000 draws; the mean of n draws of variance v lies within 4 sqrt(v / n) of its expectation."""
    score_T = [0.9, 0.6, 0.5, 0.4, 0.3, 0.1]  # chosen: 0, 1, 3 -> 2 rows (loses 0.4) or 4 (gains 0.5)
    chance = 0.5 if rule == "stochastic" else 0.4 / (0.4 + 0.5)
    rows = [len(one_expert(score_T, [0, 1, 3], 2, rule, key=key)) for key in range(3000)]
    assert set(rows) == {2, 4}
    assert sum(count == 4 for count in rows) / 3000 == pytest.approx(chance, abs=4 * 0.5 / 3000**0.5)


def test_stochastic_rounding_is_unbiased_and_nearest_is_not() -> None:
    case = Case(100, 8, 1, skew=0.1)
    before_E = case.chosen_TE.sum(0)
    mean_E = torch.stack([case.kept(8, "stochastic", key=key).sum(0) for key in range(400)]).double().mean(0)
    assert (mean_E - before_E).abs().max() < 4 * 4 / 400**0.5
    assert (case.kept(8, "nearest").sum(0) - before_E).abs().max() >= 2


def test_each_expert_and_key_has_a_draw_of_its_own_from_the_counter() -> None:
    # One row of a tile of 2 chosen: goes up where the draw is below a half.
    num_experts = 40
    score_TE = torch.rand(8, num_experts)
    gid_T2 = torch.stack((torch.zeros(8, dtype=torch.int64), torch.arange(8)), 1)
    pairs = score_TE, torch.zeros(num_experts, dtype=torch.int32), torch.arange(num_experts + 1).int()
    offers = offer_pairs(*pairs, gid_T2, 2)
    for key in (0, 12345, 2**63 - 1):
        ups_E = round_pairs(*pairs, offers, 2, "stochastic", key=key).offset_E1.diff() == 2
        draw_E = counter_uniform(key, torch.arange(num_experts), dtype=torch.float64)
        assert torch.equal(ups_E, draw_E < 0.5)


def test_16384_tokens_with_bfloat16_logits_rank_as_in_float32() -> None:
    random = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(16384, 4, generator=random).bfloat16()
    case = Case(16384, 4, 1)
    case.expert_id_TK = select_experts(logits_TE, 1).expert_id_TK
    case.score_TE = logits_TE.float().softmax(-1)
    for rule in ("up", "down"):
        kept_TE = case.kept(128, rule)
        assert torch.equal(kept_TE, case.expected(128, rule))
        assert not torch.equal(kept_TE, case.chosen_TE)
        # Ranking on one column of (score - 1 where not chosen) in bfloat16 has few distinct keys and picks others.
        merged_TE = torch.where(case.chosen_TE, case.score_TE, case.score_TE - 1).bfloat16()
        assert len(merged_TE[~case.chosen_TE].unique()) < 300
        assert len(case.score_TE.unique()) > 10_000
        merged_kept_TE = torch.zeros_like(kept_TE)
        for expert in range(4):
            best = merged_TE[:, expert].sort(descending=True, stable=True).indices[: int(kept_TE[:, expert].sum())]
            merged_kept_TE[best, expert] = True
        assert not torch.equal(merged_kept_TE, kept_TE)


def test_rows_of_scores_may_be_apart_and_threads_change_nothing(device: str) -> None:
    case = Case(500, 33, 3, device=device)
    wide = torch.full((500, 50), 9.0)
    wide[:, :33] = case.score_TE
    before, case.score_TE = case.kept(16, "up"), wide[:, :33]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(case.kept(16, "up"), before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rule", ["nearest", "up", "down"])
def test_opcheck_and_compilation(rule: RoundRule) -> None:
    case = Case(40, 5, 2, valid=True)
    score_TE, token_N, offset_E1, gid_T2, valid_T = next(case.parts())
    ops = torch.ops.moetrain
    torch.library.opcheck(ops.offer_pairs, (score_TE, token_N, offset_E1, gid_T2, valid_T, 8))
    offers_EX, token_E2M = ops.offer_pairs(score_TE, token_N, offset_E1, gid_T2, valid_T, 8)
    arguments = (score_TE, token_N, offset_E1, offers_EX[None], token_E2M, None, 0, 8, rule, 3)
    torch.library.opcheck(ops.round_pairs, arguments)

    def whole(score_TE: Tensor) -> Tensor:
        offers = offer_pairs(score_TE, token_N, offset_E1, gid_T2, 8, valid_T=valid_T)
        return round_pairs(score_TE, token_N, offset_E1, offers, 8, rule).source_P

    assert torch.equal(torch.compile(whole, fullgraph=True, backend="aot_eager")(score_TE), whole(score_TE))
