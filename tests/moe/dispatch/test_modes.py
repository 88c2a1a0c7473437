"""Dispatch in pieces, in two levels and padded: equal to the bit with all experts in one place, and what is sent.

Small whole numbers, so that no order of sums can matter. Every rank makes all ranks' tokens.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from moe.dispatch.helpers import Mode, Setting, assert_exact, body, make_groups, padding_of, spread_layer
from moe.helpers import (
    WIDTH,
    context,
    integer_routing,
    make_moe,
    tokens,
)
from ranks import run_on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.mesh import collectives
from moetrain.moe import Padding, RoutingMemo, checkpoint_contexts, make_dispatcher
from moetrain.moe.dispatch import groups as groups_module
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher, make_seat_tables
from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.moe.dispatch.padded import plan_padded
from moetrain.moe.rules.capacity import rows_within_capacity
from moetrain.placement.static import plan_static

TWO = Mode(per_node=2)
PADDED = Mode(padded=True)


MODES = {
    "pieces": Mode(pieces=3),
    "two levels": TWO,
    "two levels in pieces": Mode(per_node=2, pieces=2),
    "padded": PADDED,
    "padded in pieces": Mode(padded=True, pieces=2),
    "padded, two levels": Mode(per_node=2, padded=True),
    "padded, two levels in pieces": Mode(per_node=2, padded=True, pieces=3),
    "composed": Mode(composed=True),
    "two levels in pieces, composed": Mode(per_node=2, pieces=2, composed=True),
    "padded, two levels, composed": Mode(per_node=2, padded=True, composed=True),
}
SETTINGS = [
    Setting((5, 4, 0, 6), 6, 4),
    Setting((5, 4, 3, 6), 2, 2),  # two ranks without experts, which are a node
    Setting((0, 0, 0, 0), 8, 1),
    Setting((1, 0, 0, 0), 9, 9),
]


@pytest.mark.dist
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_one_process_to_the_bit(mode: str, setting: Setting) -> None:
    for found in run_on_ranks(4, body, setting, MODES[mode]):
        assert_exact(found)
        counted = 0 if MODES[mode].padded else 1  # for all pieces together
        assert (found["counts"], found["copies"]) == (counted, counted)
        assert found["bad"] == (None if MODES[mode].padded else ())


@pytest.mark.dist
def test_six_ranks_on_three_nodes_and_on_two() -> None:
    for per_node in (2, 3):
        for found in run_on_ranks(6, body, Setting((3, 1, 0, 4, 2, 5), 11, 5, scattered=True), Mode(per_node=per_node)):
            assert_exact(found)


def random_body(rank: int, seeds: list[int]) -> list[dict[str, Any]]:
    """One random shape, placement and mode per seed."""
    found = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, size: int = 1, rng: torch.Generator = rng) -> list[int]:
            return torch.randint(low, high, (size,), generator=rng).tolist()

        num_experts = draw(1, 10)[0]
        top_k = draw(1, num_experts + 1)[0]
        setting = Setting(tuple(draw(0, 9, 4)), num_experts, top_k, seed, scattered=True, replicated=seed % 3 > 0)
        mode = Mode(per_node=2 * draw(0, 2)[0], pieces=draw(1, 4)[0], padded=bool(draw(0, 2)[0]))
        found.append(body(rank, setting, mode))
    return found


@pytest.mark.dist
def test_random_shapes_placements_and_modes_are_equal_to_the_bit() -> None:
    for found in run_on_ranks(4, random_body, list(range(24))):
        for case in found:
            assert_exact(case)


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["pieces", "two levels", "padded"])
def test_a_dropped_pair_shows(mode: str) -> None:
    for setting in (SETTINGS[0], replace(SETTINGS[0], replicated=True)):
        found = run_on_ranks(4, body, setting, MODES[mode], "dropped pair")
        assert not found[0]["y"]
        assert not all(one["dw_out"] for one in found)


@pytest.mark.dist
def test_two_levels_send_a_token_once_to_each_node_and_once_to_each_rank_there() -> None:
    setting = Setting((6, 5, 7, 4), 8, 4)
    direct, two = (run_on_ranks(4, body, setting, mode) for mode in (Mode(), TWO))
    forwarded, kept = [0] * 4, [0] * 4  # rows that rank r passes on inside its node, and those it uses itself
    for rank, found in enumerate(two):
        nodes = [{to // 2 for to in ranks} for ranks in found["destinations"]]
        assert found["rows"]["dispatch"] == sum(len(one - {rank // 2}) for one in nodes)
        for ranks in found["destinations"]:
            for to in ranks:
                through = to // 2 * 2 + rank % 2
                (kept if to == through else forwarded)[through] += 1
    for rank, found in enumerate(two):
        assert found["rows"]["dispatch_inside"] == forwarded[rank]
        other = rank ^ 1
        assert found["rows"]["combine_inside"] == forwarded[other]
    for found in two:
        assert found["rows"]["weights_inside"] == found["rows"]["pairs_inside"] > 0
        assert found["rows"]["weights"] == found["rows"]["pairs"] > 0
    crossing = [sum(found["between"][name] for found in two) for name in ("dispatch", "combine")]
    assert crossing == [sum(found["rows"]["dispatch"] for found in two) * 4 * WIDTH] * 2
    assert all("dispatch_inside" not in found["between"] for found in two)
    direct_crossing = sum(found["between"]["dispatch"] for found in direct)
    expected = sum(to // 2 != rank // 2 for rank, found in enumerate(direct) for ranks in found["destinations"]
                   for to in ranks)  # fmt: skip
    assert direct_crossing == expected * 4 * WIDTH
    assert crossing[0] < direct_crossing


@pytest.mark.dist
def test_padded_messages_are_as_large_whatever_is_routed() -> None:
    one, other = Setting((5, 4, 0, 6), 6, 4), Setting((5, 4, 0, 6), 6, 4, seed=12)
    padding = padding_of(one)
    assert padding == padding_of(other)
    for setting in (one, other):
        for found in run_on_ranks(4, body, setting, PADDED):
            num_rows = min(padding.num_tokens, 2 * padding.limit)
            assert found["rows"]["dispatch"] == found["rows"]["combine"] == 3 * num_rows
            assert found["rows"]["weights"] == 3 * 2 * padding.limit
    for found in run_on_ranks(4, body, one, Mode(padded=True, pieces=2)):
        most = -(-padding.num_tokens // 2)
        limit = min(padding.limit, most)
        assert found["rows"]["dispatch"] == 2 * 3 * min(most, 2 * limit)
        assert found["rows"]["weights"] == 2 * 3 * 2 * limit


def blocks_body(rank: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """How often padded messages name each token and each of its two pairs, with room for 20 tokens."""
    groups = make_groups(Mode())
    try:
        to = make_seat_tables(groups).of(plan_static(groups.mesh, 4)).to
        routing = replace(integer_routing(num_tokens, 4, 2, 0), limit=num_tokens)
        (plan,) = plan_padded([routing], to, DispatchGroups.of(groups), Padding(num_tokens=20, limit=20))
        (hop,) = plan.hops
        return torch.bincount(hop.send_token_R).tolist(), torch.bincount(hop.send_pair_P).tolist()
    finally:
        groups.close()


@pytest.mark.dist
@pytest.mark.parametrize("num_tokens", [5, 0])
def test_padding_is_spread_over_tokens_and_pairs(num_tokens: int) -> None:
    """Backward adds up what repeats, so nothing repeats much more often than another. Zeros stand in for none."""
    for of_token, of_pair in run_on_ranks(2, blocks_body, num_tokens):
        assert (sum(of_token), len(of_token)) == (2 * 20, num_tokens or 20)
        assert (sum(of_pair), len(of_pair)) == (2 * 2 * 20, 2 * num_tokens or 2 * 20)
        assert max(of_token) - min(of_token) <= 2
        assert max(of_pair) - min(of_pair) <= 2


def refusal_body(rank: int, limit: int | None, num_tokens: int) -> str:
    groups = make_groups(Mode())
    try:
        padding = Padding(num_tokens=4, limit=3)
        dispatcher = make_dispatcher(plan_static(groups.mesh, 4), groups, padding=padding)
        assert isinstance(dispatcher, AllToAllDispatcher)
        routing = replace(integer_routing(num_tokens, 4, 2, 0), limit=limit)
        dispatcher.dispatch(torch.zeros(num_tokens, WIDTH), routing, torch.zeros(1, dtype=torch.int32))
    except ValueError as error:
        return str(error)
    finally:
        groups.close()
    return "no error"


@pytest.mark.dist
@pytest.mark.parametrize(("limit", "num_tokens"), [(4, 4), (3, 5)])
def test_what_does_not_fit_padded_messages_is_refused(limit: int, num_tokens: int) -> None:
    for text in run_on_ranks(2, refusal_body, limit, num_tokens):
        assert "made for at most 4 tokens and 3 pairs of an expert" in text
        assert f"got {num_tokens} tokens and a limit of {limit}" in text


def bad_body(rank: int) -> tuple[str, list[str]]:
    """What the layer says of bad logits on rank 1, and what the end of the step says, where nothing tells the host."""
    config = make_moe(capacity_factor=1.0)
    groups = make_groups(Mode())
    said = "nothing"
    try:
        layer, _, balance = spread_layer(groups, config, padding=Padding(4, rows_within_capacity(config, 4)))
        x_TD = tokens(4).detach()
        if rank == 1:
            x_TD[2, 0] = float("nan")
        layer(x_TD, context(4))
        said = "forward passed"
        balance.finish_step(lambda x: collectives.all_reduce_sum(x, groups.group("pool")))
    except FloatingPointError as error:
        return said, [str(error)]
    finally:
        groups.close()
    return said, []


@pytest.mark.dist
def test_padded_dispatch_leaves_bad_logits_to_the_end_of_the_step_on_every_rank() -> None:
    for said, errors in run_on_ranks(2, bad_body):
        assert said == "forward passed"
        assert len(errors) == 1
        assert "MoE layers [3]" in errors[0]
        assert "NaN or Inf" in errors[0]


def recompute_body(rank: int, mode: Mode, recomputed: bool) -> tuple[int, list[float]]:
    """How many exchanges of whole numbers a layer makes, forward and backward, and its gradient by tokens."""
    config = make_moe(capacity_factor=1.5)
    groups, exchanges = make_groups(mode), []
    start, exchange = collectives._start_exchange, collectives.exchange_counts

    def started(x_RD: Tensor, *args: Any) -> Any:
        exchanges.extend([1] * (not x_RD.is_floating_point()))
        return start(x_RD, *args)

    def exchanged(*args: Any, **options: Any) -> Tensor:
        exchanges.append(1)
        return exchange(*args, **options)

    try:
        padding = Padding(5, rows_within_capacity(config, 5)) if mode.padded else None
        layer, _, _ = spread_layer(groups, config, pieces=mode.pieces, padding=padding)
        x_TD = tokens(5, seed=rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "_start_exchange", started)
            patch.setattr(groups_module, "exchange_counts", exchanged)
            if recomputed:
                options: dict[str, Any] = {"use_reentrant": False, "context_fn": checkpoint_contexts}
                y_TD, aux = checkpoint(layer, x_TD, context(5), RoutingMemo(), **options)
            else:
                y_TD, aux = layer(x_TD, context(5))
            (y_TD.square().sum() + aux).backward()
        assert x_TD.grad is not None
        return len(exchanges), x_TD.grad.flatten().tolist()
    finally:
        groups.close()


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["two levels in pieces", "padded", "padded, two levels in pieces"])
def test_recomputation_plans_nothing_anew(mode: str) -> None:
    once = run_on_ranks(4, recompute_body, MODES[mode], False)
    again = run_on_ranks(4, recompute_body, MODES[mode], True)
    assert again == once
    assert all(exchanges > 0 for exchanges, _ in once)
