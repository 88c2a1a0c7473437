"""Dispatch over ranks against the same layer with all experts in one place. Every rank makes all ranks' tokens."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe.dispatch.helpers import Mode, Setting, assert_exact, body, plan_of, slice_of
from moe.helpers import (
    WIDTH,
    context,
    gradients,
    integer_routing,
    make_layer,
    make_moe,
    make_params,
    relative_error,
    tokens,
)
from ranks import run_on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.mesh import collectives
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.moe import (
    AllToAllDispatcher,
    MoEContext,
    RoutingMemo,
    checkpoint_contexts,
    make_dispatcher,
)
from moetrain.moe.dispatch import groups as groups_module
from moetrain.moe.dispatch.all_to_all import make_seat_tables
from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.placement.current import CurrentPlacement
from moetrain.placement.placement import Placement
from moetrain.placement.static import plan_static

pytestmark = pytest.mark.dist


def _groups(edp: int = 1) -> MeshGroups:
    world = dist.get_world_size()
    mesh = FoldedMesh(pp=1, dp_replicate=1, dp_shard=world, cp=1, tp=1, edp=edp, ep=world // edp, etp=1)
    return MeshGroups.create(mesh)


def _layer_body(rank: int, changes: dict[str, Any], sizes: list[int], edp: int, how: str) -> dict[str, float]:
    """Errors of this rank's outputs and gradients against one process that has all tokens and experts."""
    config = make_moe(**changes)
    params = make_params(config)
    groups = _groups(edp)
    try:
        placement = plan_static(groups.mesh, config.moe.num_experts)
        held = placement.experts_of(groups.pool_rank)
        mine = make_layer(config, params, dispatcher=make_dispatcher(placement, groups), experts=held)
        here = slice_of(rank, sizes)
        x_TD = tokens(sum(sizes)).detach()
        x_mine_TD = x_TD[here].clone().requires_grad_()
        ctx = _context_of(here, sum(sizes))
        layer, weights, balance = mine
        if how == "checkpoint":
            y_TD, aux = checkpoint(
                layer, x_mine_TD, ctx, RoutingMemo(), use_reentrant=False, context_fn=checkpoint_contexts
            )
        else:
            y_TD, aux = layer(x_mine_TD, ctx)
        pull_TD = torch.linspace(-1, 2, x_TD.numel(), dtype=torch.float64).view_as(x_TD)
        ((y_TD * pull_TD[here]).sum() + aux).backward()

        whole, whole_weights, whole_balance = make_layer(config, params)
        x_TD.requires_grad_()
        y_whole_TD, aux_whole = whole(x_TD, _context_of(slice(0, sum(sizes)), sum(sizes)))
        ((y_whole_TD * pull_TD).sum() + aux_whole).backward()

        found = gradients(layer, weights)
        for name in found:
            if not name.startswith("w_"):
                dist.all_reduce(found[name])
        for name in ("w_in", "w_out"):
            dist.all_reduce(found[name], group=groups.group("edp"))
        total_aux = aux.detach().clone()
        dist.all_reduce(total_aux)
        expected = gradients(whole, whole_weights)
        counts = balance.finish_step(_all_reduced).count_LE
        assert counts.tolist() == whole_balance.finish_step(lambda x: x).count_LE.tolist()
        errors = {name: _error(found[name], expected[name]) for name in found if not name.startswith("w_")}
        errors |= {name: _error(found[name], expected[name][list(held)]) for name in ("w_in", "w_out")}
        errors["y"] = _error(y_TD, y_whole_TD[here])
        errors["dx"] = _error(x_mine_TD.grad, x_TD.grad[here])  # type: ignore[arg-type,index]
        errors["aux"] = _error(total_aux, aux_whole)
        return errors
    finally:
        groups.close()


def _context_of(here: slice, total: int) -> MoEContext:
    """Every fifth token is padding."""
    valid = [t % 5 != 4 for t in range(total)][here]
    return context(len(valid), valid=valid, step=total)


def _all_reduced(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def _error(mine: Tensor, expected: Tensor) -> float:
    """Against at least 1, the size of the numbers in these tests: a shard's true gradient may be tiny."""
    assert mine.shape == expected.shape
    if mine.numel() == 0:
        return 0.0
    difference = (mine - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max().clamp(min=1.0))


LAYER_CASES: list[tuple[int, dict[str, Any], list[int], int]] = [
    (2, {}, [5, 6], 1),
    (2, {"num_experts": 7, "top_k": 3, "score": "sigmoid", "loss_free": True, "shared_width": 3}, [9, 0], 1),
    (2, {"top_k": 6, "activation": "gelu"}, [0, 1], 1),
    (3, {"num_experts": 7, "top_k": 3, "activation": "relu2"}, [4, 0, 7], 1),
    (3, {"num_experts": 2, "top_k": 1}, [3, 3, 3], 1),  # a rank without experts
    (3, {}, [0, 0, 0], 1),
    (4, {"num_experts": 6, "top_k": 2}, [3, 1, 0, 5], 1),
    (4, {"num_experts": 3, "top_k": 2, "balance_scope": "none"}, [3, 2, 4, 1], 2),
]


@pytest.mark.parametrize(("world", "changes", "sizes", "edp"), LAYER_CASES, ids=str)
def test_equals_one_process_in_values_and_gradients(
    world: int, changes: dict[str, Any], sizes: list[int], edp: int
) -> None:
    for errors in run_on_ranks(world, _layer_body, changes, sizes, edp, "plain"):
        assert max(errors.values()) <= 1e-11, errors


def test_micro_scope_is_the_one_that_sees_how_tokens_are_spread() -> None:
    for errors in run_on_ranks(2, _layer_body, {"balance_scope": "micro"}, [5, 6], 1, "plain"):
        assert errors.pop("aux") > 1e-3
        assert max(errors["y"], errors["w_in"], errors["w_out"]) <= 1e-11


def _checkpoint_body(rank: int) -> tuple[dict[str, float], int]:
    """Errors, and how often counts were exchanged."""
    exchanges = 0
    original = collectives.exchange_counts

    def counted(*args: Any, **options: Any) -> Tensor:
        nonlocal exchanges
        exchanges += 1
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "exchange_counts", counted)
        return _layer_body(rank, {"top_k": 3}, [4, 5], 1, "checkpoint"), exchanges


def test_recomputation_replays_the_exchange_of_counts() -> None:
    for errors, exchanges in run_on_ranks(2, _checkpoint_body):
        assert max(errors.values()) <= 1e-11, errors
        assert exchanges == 1


INTEGER_CASES = [
    (2, 5, 3, [6, 5]),
    (2, 6, 6, [3, 4]),
    (3, 8, 1, [1, 0, 9]),
    (4, 6, 4, [5, 4, 0, 6]),
    (4, 2, 2, [5, 4, 3, 6]),  # two ranks without experts
]


@pytest.mark.parametrize(("world", "num_experts", "top_k", "sizes"), INTEGER_CASES, ids=str)
def test_whole_numbers_are_equal_to_the_bit_and_a_token_is_sent_once_per_rank(
    world: int, num_experts: int, top_k: int, sizes: list[int]
) -> None:
    assert_once_per_rank(run_on_ranks(world, body, Setting(tuple(sizes), num_experts, top_k), Mode()))


def assert_once_per_rank(everyone: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(everyone):
        assert_exact(found)
        assert found["rows"]["dispatch"] == sum(len(set(ranks) - {rank}) for ranks in found["destinations"])
        others = [one for other, one in enumerate(everyone) if other != rank]
        assert found["rows"]["combine"] == sum(rank in ranks for one in others for ranks in one["destinations"])
        for purpose in ("dispatch", "combine"):
            assert found["bytes"][purpose] == 4 * WIDTH * found["rows"][purpose]
        assert found["bytes"]["counts"] == 8 * len(others) * (2 + found["most experts"])


def _random_body(rank: int, seeds: list[int]) -> list[dict[str, Any]]:
    """One random shape and placement per seed."""
    found = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        num_experts = int(torch.randint(1, 10, (), generator=rng))
        top_k = int(torch.randint(1, num_experts + 1, (), generator=rng))
        sizes = torch.randint(0, 9, (dist.get_world_size(),), generator=rng).tolist()
        found.append(body(rank, Setting(tuple(sizes), num_experts, top_k, seed, scattered=True), Mode()))
    return found


def test_random_shapes_and_placements_are_equal_to_the_bit() -> None:
    for everyone in zip(*run_on_ranks(3, _random_body, list(range(12))), strict=True):
        assert_once_per_rank(list(everyone))


@pytest.mark.parametrize("spoil", ["scaled weight", "dropped pair"])
def test_a_spoiled_routing_shows(spoil: str) -> None:
    found = run_on_ranks(2, body, Setting((6, 5), 5, 3), Mode(), spoil)
    assert not found[0]["y"]
    assert not all(found[rank]["dw_out"] for rank in (0, 1))


def _skewed_body(rank: int) -> list[int]:
    """All tokens choose expert 0, so rank 1 receives nothing; returns received rows."""
    config = make_moe(top_k=1)
    groups = _groups()
    try:
        placement = plan_static(groups.mesh, 6)
        params = make_params(config)
        with torch.no_grad():
            params["router"].zero_()
        dispatcher = make_dispatcher(placement, groups)
        layer, weights, _ = make_layer(config, params, dispatcher=dispatcher, experts=placement.experts_of(rank))
        x_TD = tokens(3 + rank)
        y_TD, aux = layer(x_TD, context(3 + rank, step=7))
        (y_TD.sum() + aux).backward()
        assert weights.w_in.grad is not None
        assert bool(weights.w_in.grad.any()) == (rank == 0)
        whole, _, _ = make_layer(config, params)
        assert relative_error(y_TD, whole(tokens(3 + rank), context(3 + rank, step=7))[0]) <= 1e-11
        routed = layer.router(x_TD, context(3 + rank))
        pending = dispatcher.dispatch(x_TD, routed.routing, routed.statistics.bad_1)
        pending.combine(lambda rows: rows.x_RD)
        return plan_of(pending).hops[0].recv_rows
    finally:
        groups.close()


def test_a_rank_may_receive_no_row() -> None:
    assert run_on_ranks(2, _skewed_body) == [[3, 4], [0, 0]]


def _choice_body(rank: int) -> tuple[str, str]:
    """The dispatcher for edp = world, and the error for an expert outside the group."""
    groups = _groups(edp=2)
    try:
        kind = type(make_dispatcher(plan_static(groups.mesh, 4), groups)).__name__
        outside = Placement.of(2, [[0], [1]], [[0], [1]])
        try:
            ep = groups.group("ep")
            AllToAllDispatcher(CurrentPlacement(outside), DispatchGroups(ep, None, ep), make_seat_tables(groups))
        except ValueError as error:
            return kind, str(error)
        return kind, "no error"
    finally:
        groups.close()


def test_one_rank_per_ep_group_is_local_and_experts_elsewhere_are_refused() -> None:
    for rank, (kind, text) in enumerate(run_on_ranks(2, _choice_body)):
        assert kind == "LocalDispatcher"
        assert f"send the tokens of group {rank} of the pool to groups among which rows move, [{rank}]" in text
        assert f"but has shares for [{1 - rank}]; let rows move over all of the pool" in text


def _order_body(rank: int, scales: list[float]) -> list[float]:
    """Every token visits every rank, which multiplies it by its scale."""
    groups = _groups()
    try:
        world = dist.get_world_size()
        dispatcher = make_dispatcher(plan_static(groups.mesh, world), groups)
        routing = integer_routing(2, world, world, seed=0)
        pending = dispatcher.dispatch(torch.ones(2, 1), routing, torch.zeros(1, dtype=torch.int32))
        return pending.combine(lambda rows: rows.x_RD * scales[rank]).flatten().tolist()
    finally:
        groups.close()


def test_combining_adds_rows_in_ascending_rank_order() -> None:
    big = 2.0**30
    assert run_on_ranks(3, _order_body, [big, -big, 1.0]) == [[1.0, 1.0]] * 3
    assert run_on_ranks(3, _order_body, [1.0, big, -big]) == [[0.0, 0.0]] * 3
