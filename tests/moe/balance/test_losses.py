from dataclasses import replace

import pytest
import torch
from moe import reference
from moe.helpers import WIDTH, context, make_moe, make_params, make_router, relative_error, tokens
from torch import Tensor

from moetrain.config import MoELayerConfig
from moetrain.moe import BalanceLosses, MoEContext

VALID = [True, True, False, True, True]
EVEN_6 = torch.full((6,), 1 / 6, dtype=torch.float64)
UNEVEN_6 = torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)


def _aux(config: MoELayerConfig, ctx: MoEContext, x_TD: Tensor, share_E: Tensor = EVEN_6) -> Tensor:
    routed = make_router(config, make_params(config)["router"])(x_TD, ctx)
    return BalanceLosses(config.balance).total(routed, ctx, share_E)


def test_perfect_balance_costs_one_coefficient() -> None:
    config = make_moe(balance_coef=0.3, z_loss_coef=0.0)
    assert float(_aux(config, context(9), tokens(9)).detach()) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("level", [0.0, -50.0, -90.0, -1e4, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_weights_and_even_balance_are_one_at_any_level(dtype: torch.dtype, level: float) -> None:
    """Eight experts, two of which each token chooses; one coordinate of the tokens lifts all logits alike."""
    config = make_moe(num_experts=8, top_k=2, score="sigmoid", balance_coef=1.0, z_loss_coef=0.0)
    weight_ED = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(4)).to(dtype)
    weight_ED[:, 0] = level
    x_TD = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype)
    x_TD[:, 0] = 1.0
    router, ctx = make_router(config, weight_ED), context(16)
    out = router(x_TD, ctx)
    aux = BalanceLosses(config.balance).total(out, ctx, torch.full((8,), 1 / 8, dtype=torch.float64))
    num_pairs = int(out.routing.offset_E1[-1])
    assert num_pairs == 32
    weight_T = torch.zeros(16, dtype=out.routing.weight_N.dtype)
    weight_T.index_add_(0, out.routing.token_N[:num_pairs].long(), out.routing.weight_N[:num_pairs].detach())
    torch.testing.assert_close(weight_T, torch.ones_like(weight_T), rtol=0, atol=1e-6)
    assert float(aux.detach()) == pytest.approx(1.0, abs=1e-6)
    aux.backward()
    assert float(router.weight.grad.abs().max()) < 1e-6, "even loads pull at nothing"  # type: ignore[union-attr]


def test_lagged_loss_adds_up_over_any_split_and_micro_does_not() -> None:
    x_TD = tokens(9)

    def split(config: MoELayerConfig) -> Tensor:
        return sum(
            (
                _aux(config, context(stop - start, step=9), x_TD[start:stop], UNEVEN_6)
                for start, stop in ((0, 2), (2, 9))
            ),
            start=torch.zeros((), dtype=torch.float64),
        )

    lagged = make_moe(balance_scope="lagged")
    assert relative_error(split(lagged), _aux(lagged, context(9), x_TD, UNEVEN_6)) <= 1e-13
    micro = replace(lagged, balance=replace(lagged.balance, scope="micro"))
    assert relative_error(split(micro), _aux(micro, context(9), x_TD, UNEVEN_6)) > 1e-3


@pytest.mark.parametrize("scope", ["lagged", "micro", "none"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loss_and_gradient_equal_the_definition(scope: str, score: str) -> None:
    config = make_moe(balance_scope=scope, score=score)
    params = make_params(config)
    x_TD = tokens(5)
    router, ctx = make_router(config, params["router"]), context(5, valid=VALID, step=11)
    out = router(x_TD, ctx)
    aux = BalanceLosses(config.balance).total(out, ctx, UNEVEN_6)
    aux.backward()
    _, expected, count_E = reference.layer(x_TD, params, config, valid=VALID, num_step_tokens=11, share_E=UNEVEN_6)
    expected.backward()
    assert relative_error(aux, expected) <= 1e-12
    assert relative_error(router.weight.grad, params["router"].grad) <= 1e-11  # type: ignore[arg-type]
    assert out.statistics.count_E.tolist() == count_E.tolist()


def test_padding_costs_nothing() -> None:
    config = make_moe()
    padded = _aux(config, context(5, valid=VALID, step=4), tokens(5))
    alone = _aux(config, context(4, step=4), tokens(5)[torch.tensor(VALID)])
    assert relative_error(padded, alone) <= 1e-13
    assert relative_error(_aux(config, context(5, step=4), tokens(5)), alone) > 1e-3


def test_no_tokens_cost_nothing_and_stay_in_the_graph() -> None:
    config = make_moe(balance_scope="micro")
    router = make_router(config, make_params(config)["router"])
    ctx = context(0, step=7)
    aux = BalanceLosses(config.balance).total(router(tokens(0), ctx), ctx, EVEN_6)
    aux.backward()
    assert float(aux.detach()) == 0.0
    assert router.weight.grad is not None
    assert not router.weight.grad.any()


def test_bf16_tokens_are_judged_in_float32() -> None:
    config = make_moe()
    router = make_router(config, make_params(config, torch.float32)["router"].detach())
    ctx = context(5)
    assert (
        BalanceLosses(config.balance).total(router(tokens(5, torch.bfloat16), ctx), ctx, EVEN_6).dtype == torch.float32
    )
