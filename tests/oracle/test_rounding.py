"""The oracle's rounding and random numbers, against cases made by hand and the other, independent definition."""

import pytest
import torch
from exact_shares import exact_token
from layer_configs import layer_config

from moetrain.config import MoELayerConfig
from moetrain.ops import counter_random
from moetrain.ops.reference_round_pairs import round_pairs_reference
from moetrain.oracle import rounding
from moetrain.oracle.random import key_of, uniform
from moetrain.oracle.rounding import round_weights, rounded_rows
from moetrain.oracle.routing import choose

RULES = ("nearest", "stochastic", "nearest_score", "balance", "up", "down")


def moe(rule: str, tile: int = 4, **options: object) -> MoELayerConfig:
    return layer_config(**{"num_experts": 9, "top_k": 2, "rounding": rule, "tile": tile, **options})


def test_random_numbers_are_those_of_the_counter() -> None:
    for parts in ((), (1,), (1234, "micro_batch", 5, 0), ("é", -3)):
        assert key_of(*parts) == counter_random.key_of(*parts)
    index_N = torch.tensor([0, 1, 2, 255, 10**12])
    for key in (0, 1, 2**63 - 1, key_of(7, "rounding", 3)):
        expected = counter_random.counter_uniform(key, index_N, dtype=torch.float64).tolist()
        assert [uniform(key, index) for index in index_N.tolist()] == expected


@pytest.mark.parametrize(
    ("rule", "draw", "surplus", "rows"),
    [
        ("nearest", 0.0, 0, 8),
        ("stochastic", 0.74, 0, 8),
        ("stochastic", 0.76, 0, 4),
        ("nearest_score", 0.24, 0, 8),  # loses 1, gains 3
        ("nearest_score", 0.26, 0, 4),
        ("balance", 0.0, 0, 8),
        ("balance", 0.0, 2, 4),  # 2 + 1 against 2 - 3
        ("balance", 0.0, -9, 8),
        ("up", 0.0, 0, 8),
        ("down", 0.0, 0, 4),
    ],
)
def test_seven_rows_in_tiles_of_four(rule: str, draw: float, surplus: int, rows: int) -> None:
    scores = [9.0, 8.0, 7.0, 6.0, 0.5, 0.25, 0.25, 3.0, 2.0, 1.0]
    found, _ = rounded_rows(scores, 7, moe(rule).dispatch, draw, surplus)
    assert found == rows


def test_what_cannot_be_rounded() -> None:
    assert rounded_rows([1.0] * 3, 2, moe("down").dispatch, 0.5, 0)[0] == 2, "fewer tokens than a tile"
    assert rounded_rows([1.0] * 7, 5, moe("up").dispatch, 0.5, 0)[0] == 4, "too few fillers"
    assert rounded_rows([1.0] * 9, 8, moe("up").dispatch, 0.5, 0)[0] == 8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "topk_softmax"])
def test_two_independent_definitions_agree(rule: str, score: str) -> None:
    config = moe(rule, score=score, weight_scale=2.0)
    logit_TE = torch.randn(60, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    choice = choose(logit_TE, config, torch.zeros(9))
    draw_E = [uniform(5, expert) for expert in range(9)]
    weight_TE, gap = round_weights(logit_TE, choice.chosen_TE, choice.weight_TE, config, draw_E)
    assert 0 < gap < 1
    score_TE = logit_TE.sigmoid() if score == "sigmoid" else logit_TE.softmax(-1)
    if score == "sigmoid":
        score_TE = score_TE / score_TE.sum(-1, keepdim=True)
    gid_T2 = torch.stack((torch.zeros(60, dtype=torch.int64), torch.arange(60)), 1)
    kept_TE = round_pairs_reference(score_TE, choice.chosen_TE, gid_T2, 4, rule, key=5)  # type: ignore[arg-type]
    assert torch.equal(weight_TE > 0, kept_TE)
    assert not torch.equal(kept_TE, choice.chosen_TE)
    stays_TE = kept_TE & choice.chosen_TE
    assert torch.equal(weight_TE[stays_TE], choice.weight_TE[stays_TE])
    torch.testing.assert_close(weight_TE[kept_TE & ~stays_TE], 2.0 * score_TE[kept_TE & ~stays_TE])


@pytest.mark.parametrize("level", [0.0, -50.0, -90.0, -1e4, 1e4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_fillers_weigh_their_shares_at_any_level(score: str, level: float) -> None:
    """Of five tokens one chose every expert, and four fill its tile."""
    config = moe("up", tile=5, score=score)
    logit_TE = level + torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen_TE = torch.tensor([[True], [False], [False], [False], [False]]).expand(5, 9)
    weight_TE, _ = round_weights(logit_TE, chosen_TE, torch.zeros(5, 9, dtype=torch.float64), config, [0.0] * 9)
    exact = [[float(x) for x in exact_token(row, [], score).probs] for row in logit_TE.tolist()]
    torch.testing.assert_close(weight_TE[1:], torch.tensor(exact[1:], dtype=torch.float64), rtol=1e-13, atol=0)


def test_the_gap_is_that_at_the_margin() -> None:
    config = moe("down", tile=2, num_experts=1, top_k=1)
    logit_TE = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    chosen_TE = torch.ones(3, 1, dtype=torch.bool)
    scores = logit_TE.sigmoid()
    config = moe("down", tile=2, num_experts=1, top_k=1, score="sigmoid", renormalise=False)
    weight_TE, gap = round_weights(logit_TE, chosen_TE, scores, config, [0.0])
    assert (weight_TE[:, 0] > 0).tolist() == [False, True, True]
    assert gap == float(scores[1, 0] - scores[0, 0])


def test_ranking_without_regard_to_choice_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rounding.round_weights

    def merged(logit_TE, chosen_TE, *rest):  # type: ignore[no-untyped-def]
        return right(logit_TE, torch.rand(chosen_TE.shape) < 0.2, *rest)

    monkeypatch.setitem(globals(), "round_weights", merged)
    with pytest.raises(AssertionError):
        test_two_independent_definitions_agree("up", "softmax")
