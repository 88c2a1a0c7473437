"""Shapes: T tokens, E experts."""

import math
from typing import Any

import pytest
import torch
from exact_shares import exact_token
from layer_configs import layer_config

from moetrain.config import MoELayerConfig
from moetrain.ops.reference_select_experts import select_experts_reference
from moetrain.oracle import routing
from moetrain.oracle.routing import auxiliary_loss, choose, moved_bias, select

NO_BIAS = torch.zeros(4, dtype=torch.float64)


def moe(**options: object) -> MoELayerConfig:
    return layer_config(**{"num_experts": 4, "top_k": 2, **options})


def log(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def test_ties_go_to_the_lower_expert_and_the_gap_says_so() -> None:
    chosen_TE, gap = select(torch.tensor([[1.0, 2.0, 2.0, 2.0], [5.0, 1.0, 1.0, 0.0]]), moe())
    assert chosen_TE.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert gap == 0.0


def test_the_gap_is_that_between_the_last_winner_and_the_best_loser() -> None:
    _, gap = select(torch.tensor([[4.0, 3.0, 1.0, 0.0], [4.0, 3.75, 3.5, 0.0]], dtype=torch.float64), moe())
    assert gap == 0.25


def test_with_as_many_choices_as_experts_nothing_can_lose() -> None:
    chosen_TE, gap = select(torch.zeros(3, 4), moe(top_k=4))
    assert chosen_TE.all()
    assert gap == math.inf


def test_no_tokens_choose_nothing() -> None:
    choice = choose(torch.zeros(0, 4), moe(), NO_BIAS)
    assert choice.weight_TE.shape == (0, 4)
    assert choice.count_E.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("top2_sum", [4, 5]),  # sums 6, 6.5, 8
        ("max", [0, 1]),  # maxima 5, 3.5, 4.5
    ],
)
def test_groups_are_kept_by_their_two_best_or_their_best(rule: str, expected: list[int]) -> None:
    score_TE = torch.tensor([[5.0, 1.0, 3.5, 3.0, 4.5, 3.5]])
    config = layer_config(num_experts=6, top_k=2, num_groups=3, groups_kept=1, group_rule=rule)
    chosen_TE, _ = select(score_TE, config)
    assert chosen_TE[0].nonzero().flatten().tolist() == expected


def test_the_gap_between_groups_counts_too() -> None:
    config = layer_config(num_experts=4, top_k=1, num_groups=2, groups_kept=1, group_rule="max")
    _, gap = select(torch.tensor([[2.0, 0.0, 1.875, 0.0]]), config)
    assert gap == 0.125


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"score": "softmax"}, [0.625, 0.375, 0, 0]),
        ({"score": "softmax", "renormalise": False}, [0.5, 0.3, 0, 0]),
        ({"score": "softmax", "weight_scale": 2.0}, [1.25, 0.75, 0, 0]),
        ({"score": "topk_softmax"}, [0.625, 0.375, 0, 0]),
    ],
)
def test_softmax_weights_by_hand(options: dict[str, Any], weights: list[float]) -> None:
    choice = choose(log(0.5, 0.3, 0.15, 0.05), moe(**options), NO_BIAS)
    torch.testing.assert_close(choice.weight_TE, torch.tensor([weights], dtype=torch.float64))
    torch.testing.assert_close(choice.prob_sum_E, torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))


def test_sigmoid_weights_and_probabilities_by_hand() -> None:
    logit_TE = torch.logit(torch.tensor([[0.9, 0.6, 0.3, 0.2]], dtype=torch.float64))
    choice = choose(logit_TE, moe(score="sigmoid", weight_scale=2.5), NO_BIAS)
    torch.testing.assert_close(choice.weight_TE, torch.tensor([[1.5, 1.0, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(choice.prob_sum_E, torch.tensor([0.45, 0.3, 0.15, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize(
    "groups", [{}, {"num_groups": 2, "groups_kept": 1, "group_rule": "max"}, {"num_groups": 2, "groups_kept": 1}]
)
@pytest.mark.parametrize("level", [0.0, 30.0, 110.0, -110.0, 800.0, -800.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_highest_logits_are_chosen_where_scores_tie(
    dtype: torch.dtype, level: float, groups: dict[str, Any], score: Any
) -> None:
    logit_TE = level + torch.arange(8, dtype=dtype)[None]
    config = layer_config(num_experts=8, top_k=2, score=score, **groups)
    choice = choose(logit_TE, config, torch.zeros(8, dtype=dtype))
    if groups.get("group_rule") != "max" and groups and score == "sigmoid" and level > 0:
        assert choice.gap < 1e-12  # two ones are as much as two others; verify passes such tokens over
        return
    assert choice.chosen_TE.nonzero()[:, 1].tolist() == [6, 7]
    assert choice.gap > 0
    of_op = select_experts_reference(logit_TE, 2, score=score, **groups)
    assert sorted(of_op.expert_id_TK[0].tolist()) == [6, 7]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("level", [0.0, -50.0, -90.0, -800.0, -1e4, 30.0, 1e4])
def test_weights_probabilities_and_gradients_at_any_logit(level: float, score: str, renormalise: bool) -> None:
    """Against numbers in which no score is too small."""
    logit_TE = level + torch.tensor([[1.25, -0.5, 2.5, 0.0], [3.0, -9.0, -8.0, 2.0]], dtype=torch.float64)
    leaf_TE = logit_TE.clone().requires_grad_()
    bias_E = torch.tensor([0.0, 1.0, 0.0, 1.5], dtype=torch.float64) * (30 if score == "topk_softmax" else 1)
    choice = choose(leaf_TE, moe(score=score, renormalise=renormalise), bias_E)
    assert choice.chosen_TE.tolist() == [[False, True, False, True]] * 2
    dweight_TE = torch.tensor([[3.0, 1.0, 7.0, -2.0], [1.0, 0.5, 1.0, 4.0]], dtype=torch.float64)
    dprob_E = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    torch.autograd.backward([choice.weight_TE, choice.prob_sum_E], [dweight_TE, dprob_E])
    exact = [
        exact_token(
            logit_TE[t].tolist(), [1, 3], score, renormalise=renormalise,
            weight_pulls=dweight_TE[t, [1, 3]].tolist(), prob_pulls=dprob_E.tolist(),
        )
        for t in range(2)
    ]  # fmt: skip
    expected_TK = torch.tensor([[float(x) for x in token.weights] for token in exact], dtype=torch.float64)
    torch.testing.assert_close(choice.weight_TE[:, [1, 3]].detach(), expected_TK, rtol=1e-14, atol=1e-300)
    expected_E = torch.tensor([[float(x) for x in token.probs] for token in exact], dtype=torch.float64).sum(0)
    torch.testing.assert_close(choice.prob_sum_E.detach(), expected_E, rtol=1e-14, atol=0)
    gradient_TE = torch.tensor([[float(x) for x in token.gradient] for token in exact], dtype=torch.float64)
    torch.testing.assert_close(leaf_TE.grad, gradient_TE, rtol=1e-12, atol=1e-14)


def test_a_bias_moves_the_choice_and_not_the_weight() -> None:
    bias_E = torch.tensor([0, 0, 0, 0.5], dtype=torch.float64)
    choice = choose(
        torch.logit(torch.tensor([[0.8, 0.6, 0.3, 0.2]], dtype=torch.float64)), moe(score="sigmoid"), bias_E
    )
    torch.testing.assert_close(choice.weight_TE, torch.tensor([[0.8, 0, 0, 0.2]], dtype=torch.float64))
    assert choice.count_E.tolist() == [1, 0, 0, 1]


def test_renormalised_softmax_equals_softmax_of_the_chosen() -> None:
    logit_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first, second = (
        choose(logit_TE, layer_config(num_experts=8, top_k=3, score=score), torch.zeros(8)).weight_TE
        for score in ("softmax", "topk_softmax")
    )
    torch.testing.assert_close(first, second, rtol=1e-13, atol=1e-15)


def test_perfect_balance_costs_one_times_the_coefficient() -> None:
    config = moe(top_k=1, balance_coef=0.25, z_loss_coef=0.0)
    logit_TE = torch.zeros(8, 4, dtype=torch.float64)
    choice = choose(logit_TE, config, NO_BIAS)
    aux = auxiliary_loss(logit_TE, choice, config, torch.tensor([2, 2, 2, 2]), 8)
    assert float(aux) == pytest.approx(0.25, abs=1e-15)


@pytest.mark.parametrize(
    ("scope", "lagged", "expected"),
    [
        # mean probabilities 0.5, 0.3, 0.15, 0.05 of each of 2 of the step's 10 tokens; 4 experts, coefficient 0.1
        ("lagged", [0, 0, 0, 0], 0.1 * 4 * 0.25 * 2 / 10),
        ("lagged", [6, 0, 0, 2], 0.1 * 4 * (0.75 * 0.5 + 0.25 * 0.05) * 2 / 10),
        ("micro", [6, 0, 0, 2], 0.1 * 4 * (0.5 * 0.5 + 0.5 * 0.3) * 2 / 10),
        ("none", [6, 0, 0, 2], 0.0),
    ],
)
def test_balance_loss_by_hand(scope: str, lagged: list[int], expected: float) -> None:
    config = moe(balance_scope=scope, balance_coef=0.1, z_loss_coef=0.0)
    logit_TE = log(0.5, 0.3, 0.15, 0.05).repeat(2, 1)
    aux = auxiliary_loss(logit_TE, choose(logit_TE, config, NO_BIAS), config, torch.tensor(lagged), 10)
    assert float(aux) == pytest.approx(expected, rel=1e-13, abs=1e-18)


def test_z_loss_by_hand() -> None:
    config = moe(balance_coef=0.0, z_loss_coef=0.5)
    logit_TE = log(1.0, 2.0, 3.0, 4.0)
    aux = auxiliary_loss(logit_TE, choose(logit_TE, config, NO_BIAS), config, torch.zeros(4), 3)
    assert float(aux) == pytest.approx(0.5 * math.log(10) ** 2 / 3, rel=1e-14)


def test_bias_goes_up_for_too_few_and_down_for_too_many() -> None:
    config = moe(score="sigmoid", loss_free=True, bias_rate=0.25)
    assert moved_bias(NO_BIAS, torch.tensor([1, 2, 3, 2]), config.balance).tolist() == [0.25, 0, -0.25, 0]
    assert moved_bias(NO_BIAS, torch.tensor([1, 2, 3, 2]), moe().balance).tolist() == [0, 0, 0, 0]


def test_a_choice_by_unbiased_score_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = routing.select
    monkeypatch.setattr(routing, "select", lambda score_TE, config, worth_TE: right(-score_TE, config, worth_TE))
    with pytest.raises(AssertionError):
        test_a_bias_moves_the_choice_and_not_the_weight()
