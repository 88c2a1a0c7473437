"""Shapes: T tokens, E experts, M rows of a tile, W ranks."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exact_shares import exact_token
from known import sum_of
from moe import reference
from moe.helpers import WIDTH, choices_of, context, gradients, make_layer, make_moe, make_params, make_router, tokens
from ranks import run_on_ranks
from torch import Tensor

from moetrain.config import DispatchConfig, MeshConfig, MoELayerConfig
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe import MoEContext, Rounding, Routing, make_rounding, rounding_score
from moetrain.ops import key_of
from moetrain.ops.reference_round_pairs import round_pairs_reference
from moetrain.placement.static import plan_static

RULES = ("nearest", "stochastic", "nearest_score", "balance", "up", "down")


def chosen_and_weights(logits_TE: Tensor, config: MoELayerConfig, valid: list[bool]) -> tuple[Tensor, Tensor]:
    """The router's choice as [T, E], by loops."""
    score_TE = reference.scores(logits_TE, config)
    chosen_TE = torch.zeros(logits_TE.shape, dtype=torch.bool)
    rows = []
    for t in range(len(logits_TE)):
        ids = reference.chosen(
            (logits_TE if config.router.score == "topk_softmax" else score_TE)[t].tolist(), config.moe.top_k
        )
        chosen_TE[t, ids] = valid[t]
        row_E = torch.zeros_like(logits_TE[t])
        rows.append(row_E.index_put((torch.tensor(ids),), reference.weights_of(logits_TE[t], score_TE[t], ids, config)))
    return chosen_TE, torch.stack(rows)


def definition(x_TD: Tensor, params: dict[str, Tensor], config: MoELayerConfig, ctx: MoEContext, layer: int) -> Tensor:
    """The layer's output with its pairs rounded: chosen pairs weigh as before, fillers their raw score."""
    logits_TE = x_TD @ params["router"].T
    chosen_TE, weight_TE = chosen_and_weights(logits_TE, config, ctx.valid_T.tolist())
    raw_TE = logits_TE.sigmoid() if config.router.score == "sigmoid" else logits_TE.softmax(-1)
    if config.router.score == "sigmoid" and config.router.renormalise:
        raw_TE = raw_TE / raw_TE.sum(-1, keepdim=True)
    key = key_of(ctx.random_key, "rounding", layer)
    assert config.dispatch.rounding != "none"
    kept_TE = round_pairs_reference(
        raw_TE.detach(),
        chosen_TE,
        ctx.token_gid_T2,
        config.dispatch.tile,
        config.dispatch.rounding,
        key=key,
        valid_T=ctx.valid_T,
    )
    assert not torch.equal(kept_TE, chosen_TE)
    pair_TE = torch.where(chosen_TE, weight_TE, raw_TE * config.router.weight_scale) * kept_TE
    rows = []
    for t, x_D in enumerate(x_TD):
        outs = [
            reference.expert(x_D, params["w_in"][e], params["w_out"][e], config.moe.activation)
            for e in range(config.moe.num_experts)
        ]
        rows.append(sum_of(pair_TE[t, e] * out for e, out in enumerate(outs)))
    return torch.stack(rows)


CASES: list[dict[str, Any]] = [
    *({"rounding": rule} for rule in RULES),
    {"rounding": "up", "score": "sigmoid", "weight_scale": 2.5, "loss_free": True},
    {"rounding": "balance", "score": "sigmoid", "renormalise": False},
    {"rounding": "up", "score": "topk_softmax", "activation": "gelu"},
    {"rounding": "nearest", "renormalise": False, "num_experts": 7, "top_k": 3},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_layer_and_its_gradients_equal_the_definition(changes: dict[str, Any]) -> None:
    config = make_moe(tile=4, balance_scope="none", z_loss_coef=0.0, **changes)
    params = make_params(config)
    layer, weights, balance = make_layer(config, params)
    ctx = context(30, valid=[t % 7 != 2 for t in range(30)])
    x_TD = tokens(30)
    y_TD, _ = layer(x_TD, ctx)
    pull_TD = torch.linspace(-1, 1.7, y_TD.numel(), dtype=torch.float64).view_as(y_TD)
    (y_TD * pull_TD).sum().backward()
    mine = {"y": y_TD, "dx": x_TD.grad, **gradients(layer, weights)}
    x_TD.grad = None
    expected_TD = definition(x_TD, params, config, ctx, 3)
    (expected_TD * pull_TD).sum().backward()
    theirs = {"y": expected_TD, "dx": x_TD.grad} | {name: p.grad for name, p in params.items()}
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-11)
    report = balance.finish_step(lambda x: x)
    assert report.rows_added[0] + report.rows_dropped[0] > 0
    assert report.count_LE.sum() == int(ctx.valid_T.sum()) * config.moe.top_k, "counts are the router's own"


def test_fillers_carry_gradient_to_the_router() -> None:
    """All that is left of each token but a filler's weight is constant: one expert of two is chosen by all."""
    config = make_moe(num_experts=2, top_k=1, rounding="up", tile=4, balance_scope="none", z_loss_coef=0.0)
    params = make_params(config)
    layer, _, _ = make_layer(config, params)
    x_TD = tokens(9)
    y_TD, _ = layer(x_TD, context(9))
    y_TD.sum().backward()
    grad = layer.router.weight.grad
    assert grad is not None
    assert grad.any(), "with top-1 renormalised weights are 1, so all gradient is the fillers'"
    exact, _, _ = make_layer(replace(config, dispatch=DispatchConfig()), params)
    y_TD, _ = exact(tokens(9), context(9))
    y_TD.sum().backward()
    assert exact.router.weight.grad is not None
    assert exact.router.weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_evaluation_and_tiles_of_one_are_exact_top_k(rule: str) -> None:
    exact, _, _ = make_layer(make_moe(), make_params(make_moe()))
    x_TD = tokens(40)
    expected_TD, _ = exact(x_TD, context(40))
    for tile, training, same in ((8, False, True), (1, True, True), (8, True, False)):
        config = make_moe(rounding=rule, tile=tile)
        layer, _, balance = make_layer(config, make_params(config))
        y_TD, _ = layer(x_TD, context(40, training=training))
        assert torch.equal(y_TD, expected_TD) is same
        report = balance.finish_step(lambda x: x)
        assert (sum(report.rows_added) + sum(report.rows_dropped) == 0) is same


def test_draws_differ_by_layer_step_and_round_and_repeat_for_the_same() -> None:
    config = make_moe(num_experts=12, rounding="stochastic", tile=8)
    rounding = Rounding("stochastic", config)
    routing, logits_TE, ctx = routed(config, 200, 0)
    kept = {}
    for layer in (0, 1):
        for key in (key_of(7, "micro_batch", step, idx) for step in (0, 1) for idx in (0, 1)):
            rounded = rounding.apply(routing, logits_TE, with_key(ctx, key), layer)
            again = rounding.apply(routing, logits_TE, with_key(ctx, key), layer)
            assert torch.equal(rounded.routing.offset_E1, again.routing.offset_E1)
            rounded.routing.validate()
            kept[layer, key] = tuple(rounded.routing.offset_E1.tolist())
    assert len(set(kept.values())) == 8


def with_key(ctx: MoEContext, key: int) -> MoEContext:
    return MoEContext(ctx.valid_T, ctx.token_gid_T2, ctx.num_step_tokens, ctx.training, key)


def test_no_tokens_and_nothing_but_padding() -> None:
    config = make_moe(rounding="up", tile=4)
    params = make_params(config)
    for num_tokens in (0, 6):
        layer, _, balance = make_layer(config, params)
        y_TD, aux = layer(tokens(num_tokens), context(num_tokens, valid=[False] * num_tokens))
        (y_TD.sum() + aux).backward()
        assert y_TD.shape == (num_tokens, WIDTH)
        assert not y_TD.any()
        assert balance.finish_step(lambda x: x).rows_added == (0,)


def test_a_filler_never_weighs_more_than_a_choice_would() -> None:
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for score in ("softmax", "topk_softmax", "sigmoid"):
        for renormalise in (True, False):
            config = make_moe(num_experts=8, score=score, renormalise=renormalise)
            _, weight_TE = chosen_and_weights(logits_TE, config, [True] * 50)
            score_TE = rounding_score(logits_TE, config.router)
            assert (score_TE <= weight_TE + 1e-12)[weight_TE > 0].all()


@pytest.mark.parametrize("level", [0.0, -50.0, -90.0, -1e4, 1e4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_what_fillers_weigh_sums_to_one_and_keeps_its_ratios_at_any_level(score: str, level: float) -> None:
    logits_TE = level + torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kind = make_moe(num_experts=8, score=score)
    exact = [exact_token(row, [], score).probs for row in logits_TE.tolist()]
    expected_TE = torch.tensor([[float(x) for x in row] for row in exact], dtype=torch.float64)
    torch.testing.assert_close(rounding_score(logits_TE, kind.router), expected_TE, rtol=1e-13, atol=0)


# Several ranks.


def routed(
    config: MoELayerConfig, num_tokens: int, seed: int, here: slice = slice(None)
) -> tuple[Routing, Tensor, MoEContext]:
    """What a router says of some of the tokens of a batch; the batch is the same on all ranks."""
    router = make_router(config, make_params(config)["router"].detach())
    x_TD = tokens(num_tokens, torch.float64, seed)[here]
    gid_T2 = torch.stack((torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens)), dim=1)[here]
    valid_T = (torch.arange(num_tokens) % 11 != 4)[here]
    ctx = MoEContext(valid_T, gid_T2.contiguous(), num_tokens, True, 99)
    out = router(x_TD, ctx)
    return out.routing, out.logits_TE, ctx


CUTS = {1: [0, 120], 2: [0, 50, 120], 4: [0, 31, 31, 90, 120]}  # one of four ranks has no tokens


def pairs_of_rank(
    rank: int, mesh: MeshConfig, rule: str, num_experts: int, alone: bool
) -> tuple[list[list[int]], list[int], int]:
    """Experts of each of this rank's tokens after rounding, rows added and dropped, bytes of offers sent."""
    world = dist.get_world_size()
    config = make_moe(num_experts=num_experts, top_k=3, rounding=rule, tile=8)
    groups = MeshGroups.create(FoldedMesh.from_config(mesh, world))
    counter = TrafficCounter()
    try:
        rounding = make_rounding(config, plan_static(groups.mesh, num_experts), groups, counter)
        if alone:
            rounding = Rounding(rule, config)  # type: ignore[arg-type]
        assert rounding is not None
        start, stop = CUTS[world][rank : rank + 2]
        routing, logits_TE, ctx = routed(config, 120, 1, slice(start, stop))
        rounded = rounding.apply(routing, logits_TE, ctx, 0)
        rounded.routing.validate()
        changed = [int(rounded.added_E.sum()), int(rounded.dropped_E.sum())]
        return choices_of(rounded.routing), changed, counter.bytes.get("offers", 0)
    finally:
        groups.close()


def pairs(world: int, rule: str, *, num_experts: int = 10, alone: bool = False, **mesh: Any) -> list[list[int]]:
    parts = run_on_ranks(world, pairs_of_rank, MeshConfig(**mesh), rule, num_experts, alone)
    return [experts for part, _, _ in parts for experts in part]


@pytest.mark.dist
@pytest.mark.parametrize("rule", RULES)
def test_ranks_that_send_to_the_same_holders_round_as_one_process(rule: str) -> None:
    one = pairs(1, rule)
    assert pairs(2, rule, ep=2) == one
    assert pairs(4, rule, ep=4) == one
    rows_E = torch.bincount(torch.tensor([e for experts in one for e in experts]), minlength=10)
    assert (rows_E % 8 == 0).all()


@pytest.mark.dist
def test_rounding_on_each_rank_alone_would_be_noticed() -> None:
    assert pairs(2, "nearest", ep=2, alone=True) != pairs(2, "nearest", ep=2)


@pytest.mark.dist
def test_each_dispatch_group_is_a_domain_of_its_own() -> None:
    """ep=2 on four ranks: ranks 0 and 1 round together, and ranks 2 and 3."""
    found = pairs(4, "nearest", ep=2)
    config = make_moe(num_experts=10, top_k=3, rounding="nearest", tile=8)
    expected: list[list[int]] = []
    for start, stop in ((0, 31), (31, 120)):
        routing, logits_TE, ctx = routed(config, 120, 1, slice(start, stop))
        expected += choices_of(Rounding("nearest", config).apply(routing, logits_TE, ctx, 0).routing)
    assert found == expected
    assert found != pairs(1, "nearest")


@pytest.mark.dist
def test_offers_are_counted_as_traffic_and_local_experts_exchange_none() -> None:
    with_peers = run_on_ranks(2, pairs_of_rank, MeshConfig(ep=2), "up", 10, False)
    assert [part[2] for part in with_peers] == [10 * (4 + 6 * 8) * 8] * 2
    assert sum(part[1][0] for part in with_peers) > 0
    without = run_on_ranks(2, pairs_of_rank, MeshConfig(ep=1), "up", 10, False)
    assert [part[2] for part in without] == [0, 0]


def roundings_for_any_device(rank: int) -> None:
    groups = MeshGroups.create(FoldedMesh.from_config(MeshConfig(), 1))
    placement = plan_static(groups.mesh, 6)
    for device in ("cpu", "cuda"):
        assert make_rounding(make_moe(), placement, groups, device=device) is None
        assert isinstance(make_rounding(make_moe(rounding="up"), placement, groups, device=device), Rounding)
    groups.close()


@pytest.mark.dist
def test_only_what_asks_for_it_is_rounded_on_any_device() -> None:
    run_on_ranks(1, roundings_for_any_device)


def test_routing_offsets_are_whole_tiles() -> None:
    config = make_moe(num_experts=10, top_k=3, rounding="nearest", tile=8)
    routing, logits_TE, ctx = routed(config, 120, 1)
    rounded = Rounding("nearest", config).apply(routing, logits_TE, ctx, 0).routing
    assert all((stop - start) % 8 == 0 for start, stop in pairwise(rounded.offset_E1.tolist()))
    assert any((stop - start) % 8 for start, stop in pairwise(routing.offset_E1.tolist()))
