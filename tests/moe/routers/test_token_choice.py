import pytest
import torch
from moe import reference
from moe.helpers import context, make_moe, make_params, make_router, relative_error, tokens
from torch import Tensor

from moetrain.config import MoELayerConfig
from moetrain.moe import RouterOutput

VALID = [True, True, False, True, True]


def _dense(out: RouterOutput, num_experts: int) -> Tensor:
    """[T, E] weights, zero where an expert was not chosen."""
    routing = out.routing.validate()
    count_E = routing.offset_E1.diff().long()
    expert_N = torch.arange(num_experts).repeat_interleave(count_E)
    weight_TE = torch.zeros(routing.num_tokens, num_experts, dtype=routing.weight_N.dtype)
    num_pairs = len(expert_N)
    return weight_TE.index_put((routing.token_N[:num_pairs].long(), expert_N), routing.weight_N[:num_pairs])


def _expected(x_TD: Tensor, weight_ED: Tensor, config: MoELayerConfig, bias_E: Tensor | None = None) -> Tensor:
    logits_TE = x_TD @ weight_ED.T
    score_TE = reference.scores(logits_TE, config)
    steered_TE = score_TE.detach() if bias_E is None else score_TE.detach() + bias_E
    rows = []
    for t in range(len(x_TD)):
        row_E = torch.zeros(config.moe.num_experts, dtype=x_TD.dtype)
        if VALID[t]:
            ids = reference.chosen(steered_TE[t].tolist(), config.moe.top_k)
            row_E = row_E.index_put((torch.tensor(ids),), reference.weights_of(logits_TE[t], score_TE[t], ids, config))
        rows.append(row_E)
    return torch.stack(rows)


@pytest.mark.parametrize("score", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_weights_and_their_gradients_equal_the_definition(score: str, renormalise: bool, top_k: int) -> None:
    config = make_moe(score=score, renormalise=renormalise, top_k=top_k, weight_scale=2.5)
    weight_ED = make_params(config)["router"]
    x_TD = tokens(5)
    router = make_router(config, weight_ED)
    out = router(x_TD, context(5, valid=VALID))
    mine_TE = _dense(out, 6)
    pull_TE = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)
    (mine_TE * pull_TE).sum().backward()
    mine_dx, x_TD.grad = x_TD.grad, None
    expected_TE = _expected(x_TD, weight_ED, config)
    (expected_TE * pull_TE).sum().backward()
    assert relative_error(mine_TE, expected_TE) <= 1e-12
    largest = max(float(weight_ED.grad.abs().max()), 1e-12)  # type: ignore[union-attr]
    assert float((router.weight.grad - weight_ED.grad).abs().max()) <= 1e-12 * largest + 1e-13  # type: ignore[operator]
    torch.testing.assert_close(mine_dx, x_TD.grad, rtol=1e-11, atol=1e-13)
    assert relative_error(mine_TE * (1 + 1e-9), expected_TE) > 1e-12, "a scaled weight must show"


def test_renormalised_softmax_then_topk_equals_topk_then_softmax() -> None:
    weight_ED = make_params(make_moe())["router"]
    first, second = (
        _dense(make_router(make_moe(score=score, top_k=3), weight_ED)(tokens(7), context(7)), 6)
        for score in ("softmax", "topk_softmax")
    )
    torch.testing.assert_close(first, second, rtol=1e-13, atol=0)
    raw = make_moe(score="softmax", top_k=3, renormalise=False)
    other = _dense(make_router(raw, weight_ED)(tokens(7), context(7)), 6)
    assert relative_error(other, second) > 1e-3


def test_bias_steers_selection_and_nothing_else() -> None:
    config = make_moe(score="sigmoid", loss_free=True)
    weight_ED = make_params(config)["router"]
    bias_E = torch.tensor([0.0, 0.9, 0.0, -0.9, 0.0, 0.3], dtype=torch.float64)
    out = make_router(config, weight_ED)(tokens(5), context(5, valid=VALID), bias_E)
    assert relative_error(_dense(out, 6), _expected(tokens(5), weight_ED, config, bias_E)) <= 1e-12
    unsteered = make_router(config, weight_ED)(tokens(5), context(5, valid=VALID))
    assert out.statistics.count_E.tolist() != unsteered.statistics.count_E.tolist()


def test_groups_limit_the_choice() -> None:
    config = make_moe(score="sigmoid", num_groups=3, groups_kept=1)
    out = make_router(config, make_params(config)["router"])(tokens(8), context(8))
    group_of_choice = (_dense(out, 6) > 0).view(8, 3, 2).any(-1)
    assert group_of_choice.sum(1).tolist() == [1] * 8


def test_padding_is_routed_nowhere_and_counted_nowhere() -> None:
    config = make_moe()
    router = make_router(config, make_params(config)["router"])
    padded = router(tokens(5), context(5, valid=VALID, step=4))
    kept_TD = tokens(5)[torch.tensor(VALID)]
    alone = router(kept_TD, context(4, step=4))
    assert padded.statistics.count_E.tolist() == alone.statistics.count_E.tolist()
    assert int(padded.statistics.count_E.sum()) == 8
    assert torch.equal(_dense(padded, 6)[torch.tensor(VALID)], _dense(alone, 6))
    everyone = router(tokens(5), context(5, step=4))
    assert int(everyone.statistics.count_E.sum()) == 10


def test_bf16_tokens_are_scored_in_float32() -> None:
    config = make_moe()
    weight_ED = make_params(config, torch.float32)["router"].detach()
    x_TD = tokens(5, torch.bfloat16).detach()
    out = make_router(config, weight_ED)(x_TD, context(5))
    assert out.routing.weight_N.dtype == out.logits_TE.dtype == out.statistics.prob_sum_E.dtype == torch.float32
    expected = make_router(config, weight_ED)(x_TD.float(), context(5))
    assert torch.equal(out.routing.weight_N, expected.routing.weight_N)
    narrow = make_router(config, weight_ED.bfloat16())(x_TD, context(5))
    assert not torch.equal(out.routing.weight_N, narrow.routing.weight_N)


def test_no_tokens_cost_nothing_and_stay_in_the_graph() -> None:
    config = make_moe()
    router = make_router(config, make_params(config)["router"])
    out = router(tokens(0), context(0, step=7))
    (out.statistics.prob_sum_E.sum() + out.routing.weight_N.sum()).backward()
    assert not out.statistics.prob_sum_E.any()
    assert out.statistics.count_E.tolist() == [0] * 6
    assert router.weight.grad is not None
    assert not router.weight.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_logit_is_flagged(bad: float) -> None:
    config = make_moe()
    router = make_router(config, make_params(config)["router"])
    x_TD = tokens(5).detach()
    assert not router(x_TD, context(5)).statistics.bad_1.any()
    x_TD[3, 2] = bad
    assert router(x_TD, context(5)).statistics.bad_1.any()
