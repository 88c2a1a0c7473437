from dataclasses import replace

import pytest
import torch
from moe import reference
from moe.helpers import WIDTH, context, make_moe, make_params, relative_error, tokens
from torch import Tensor

from moetrain.config import MoELayerConfig
from moetrain.moe import MoEContext, Router, RouterOutput

VALID = [True, True, False, True, True]
EVEN_6 = torch.full((6,), 1 / 6, dtype=torch.float64)


def _router(config: MoELayerConfig, weight_ED: Tensor) -> Router:
    router = Router(config, WIDTH, layer_idx=0).to(weight_ED.dtype)
    with torch.no_grad():
        router.weight.copy_(weight_ED)
    return router


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
    router = _router(config, weight_ED)
    out = router(x_TD, context(5, valid=VALID), EVEN_6)
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
        _dense(_router(make_moe(score=score, top_k=3), weight_ED)(tokens(7), context(7), EVEN_6), 6)
        for score in ("softmax", "topk_softmax")
    )
    torch.testing.assert_close(first, second, rtol=1e-13, atol=0)
    raw = make_moe(score="softmax", top_k=3, renormalise=False)
    other = _dense(_router(raw, weight_ED)(tokens(7), context(7), EVEN_6), 6)
    assert relative_error(other, second) > 1e-3


def test_bias_steers_selection_and_nothing_else() -> None:
    config = make_moe(score="sigmoid", loss_free=True)
    weight_ED = make_params(config)["router"]
    bias_E = torch.tensor([0.0, 0.9, 0.0, -0.9, 0.0, 0.3], dtype=torch.float64)
    out = _router(config, weight_ED)(tokens(5), context(5, valid=VALID), EVEN_6, bias_E)
    assert relative_error(_dense(out, 6), _expected(tokens(5), weight_ED, config, bias_E)) <= 1e-12
    assert (
        out.count_E.tolist() != _router(config, weight_ED)(tokens(5), context(5, valid=VALID), EVEN_6).count_E.tolist()
    )


def test_groups_limit_the_choice() -> None:
    config = make_moe(score="sigmoid", num_groups=3, groups_kept=1)
    out = _router(config, make_params(config)["router"])(tokens(8), context(8), EVEN_6)
    group_of_choice = (_dense(out, 6) > 0).view(8, 3, 2).any(-1)
    assert group_of_choice.sum(1).tolist() == [1] * 8


def test_padding_is_routed_nowhere_and_counted_nowhere() -> None:
    config = make_moe()
    router = _router(config, make_params(config)["router"])
    padded = router(tokens(5), context(5, valid=VALID, step=4), EVEN_6)
    kept_TD = tokens(5)[torch.tensor(VALID)]
    alone = router(kept_TD, context(4, step=4), EVEN_6)
    assert padded.count_E.tolist() == alone.count_E.tolist()
    assert int(padded.count_E.sum()) == 8
    assert relative_error(padded.aux, alone.aux) <= 1e-13
    assert torch.equal(_dense(padded, 6)[torch.tensor(VALID)], _dense(alone, 6))
    everyone = router(tokens(5), context(5, step=4), EVEN_6)
    assert relative_error(everyone.aux, alone.aux) > 1e-3


def _aux(config: MoELayerConfig, ctx: MoEContext, x_TD: Tensor, share_E: Tensor = EVEN_6) -> Tensor:
    return _router(config, make_params(config)["router"])(x_TD, ctx, share_E).aux


def test_perfect_balance_costs_one_coefficient() -> None:
    config = make_moe(balance_coef=0.3, z_loss_coef=0.0)
    assert float(_aux(config, context(9), tokens(9)).detach()) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("level", [0.0, -50.0, -90.0, -1e4, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_weights_and_even_balance_are_one_at_any_level(dtype: torch.dtype, level: float) -> None:
    """Eight experts, two of which each token chooses; one coordinate of the tokens lifts all logits alike."""
    moe = make_moe(num_experts=8, top_k=2, score="sigmoid", balance_coef=1.0, z_loss_coef=0.0)
    weight_ED = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype)
    weight_ED[:, 0] = level
    x_TD = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    x_TD[:, 0] = 1.0
    router = _router(moe, weight_ED)
    out = router(x_TD, context(16), torch.full((8,), 1 / 8, dtype=torch.float64))
    weight_T = _dense(out, 8).sum(1)
    torch.testing.assert_close(weight_T, torch.ones_like(weight_T), rtol=0, atol=1e-6)
    assert float(out.aux.detach()) == pytest.approx(1.0, abs=1e-6)
    out.aux.backward()
    assert float(router.weight.grad.abs().max()) < 1e-6, "even loads pull at nothing"  # type: ignore[union-attr]


def test_lagged_loss_adds_up_over_any_split_and_micro_does_not() -> None:
    share_E = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    x_TD = tokens(9)

    def split(config: MoELayerConfig) -> Tensor:
        return sum(
            (
                _aux(config, context(stop - start, step=9), x_TD[start:stop], share_E)
                for start, stop in ((0, 2), (2, 9))
            ),
            start=torch.zeros((), dtype=torch.float64),
        )

    lagged = make_moe(balance_scope="lagged")
    assert relative_error(split(lagged), _aux(lagged, context(9), x_TD, share_E)) <= 1e-13
    micro = replace(lagged, balance=replace(lagged.balance, scope="micro"))
    assert relative_error(split(micro), _aux(micro, context(9), x_TD, share_E)) > 1e-3


@pytest.mark.parametrize("scope", ["lagged", "micro", "none"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loss_and_gradient_equal_the_definition(scope: str, score: str) -> None:
    config = make_moe(balance_scope=scope, score=score)
    params = make_params(config)
    share_E = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    x_TD = tokens(5)
    router = _router(config, params["router"])
    out = router(x_TD, context(5, valid=VALID, step=11), share_E)
    out.aux.backward()
    _, expected, count_E = reference.layer(x_TD, params, config, valid=VALID, num_step_tokens=11, share_E=share_E)
    expected.backward()
    assert relative_error(out.aux, expected) <= 1e-12
    assert relative_error(router.weight.grad, params["router"].grad) <= 1e-11  # type: ignore[arg-type]
    assert out.count_E.tolist() == count_E.tolist()


def test_bf16_tokens_are_scored_in_float32() -> None:
    config = make_moe()
    weight_ED = make_params(config, torch.float32)["router"].detach()
    x_TD = tokens(5, torch.bfloat16).detach()
    out = _router(config, weight_ED)(x_TD, context(5), EVEN_6)
    assert out.routing.weight_N.dtype == out.aux.dtype == torch.float32
    expected = _router(config, weight_ED)(x_TD.float(), context(5), EVEN_6)
    assert torch.equal(out.routing.weight_N, expected.routing.weight_N)
    narrow = _router(config, weight_ED.bfloat16())(x_TD, context(5), EVEN_6)
    assert not torch.equal(out.routing.weight_N, narrow.routing.weight_N)


def test_no_tokens_cost_nothing_and_stay_in_the_graph() -> None:
    config = make_moe(balance_scope="micro")
    router = _router(config, make_params(config)["router"])
    out = router(tokens(0), context(0, step=7), EVEN_6)
    (out.aux + out.routing.weight_N.sum()).backward()
    assert float(out.aux.detach()) == 0.0
    assert out.count_E.tolist() == [0] * 6
    assert router.weight.grad is not None
    assert not router.weight.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_logit_is_flagged(bad: float) -> None:
    config = make_moe()
    router = _router(config, make_params(config)["router"])
    x_TD = tokens(5).detach()
    assert not router(x_TD, context(5), EVEN_6).bad_1.any()
    x_TD[3, 2] = bad
    assert router(x_TD, context(5), EVEN_6).bad_1.any()
