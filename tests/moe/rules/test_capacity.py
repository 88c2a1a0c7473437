"""Capacity against its definition, one pair at a time, and its gradient."""

from itertools import pairwise

import pytest
import torch
from layer_configs import layer_config
from torch import Tensor

from moetrain.config import DispatchConfig
from moetrain.moe.routing import Routing
from moetrain.moe.rules.capacity import drop_beyond_capacity, rows_within_capacity
from moetrain.ops import route


def routing_of(num_tokens: int, seed: int, *, ties: bool = False, top_k: int = 2, num_experts: int = 5) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    if ties:
        logits_TE = logits_TE.round()
    valid_T = torch.rand(num_tokens, generator=generator) < 0.9
    routed = route(logits_TE, top_k, valid_T=valid_T)
    gid_T2 = torch.arange(2 * num_tokens).view(-1, 2)
    return Routing(routed.token_N, routed.weight_N.requires_grad_(), routed.offset_E1, gid_T2, num_tokens)


def by_definition(routing: Routing, limit: int, by: str) -> list[list[tuple[int, float]]]:
    offsets, kept = routing.offset_E1.tolist(), []
    for start, stop in pairwise(offsets):
        pairs = list(zip(routing.token_N[start:stop].tolist(), routing.weight_N[start:stop].tolist(), strict=True))
        best = sorted(pairs, key=(lambda pair: (-pair[1], pair[0])) if by == "weight" else (lambda pair: pair[0]))
        kept.append(sorted(best[:limit]))
    return kept


def pairs_of(routing: Routing) -> list[list[tuple[int, float]]]:
    offsets = routing.offset_E1.tolist()
    weights = routing.weight_N.tolist()
    return [[(int(routing.token_N[at]), weights[at]) for at in range(start, stop)] for start, stop in pairwise(offsets)]


@pytest.mark.parametrize(
    ("factor", "num_tokens", "num_experts", "rows"),
    [(1.25, 64, 8, 20), (1.0, 23, 5, 10), (0.5, 23, 5, 5), (1.25, 65, 8, 21), (0.01, 1, 5, 1), (9.0, 0, 5, 0)],
)
def test_a_part_of_a_row_is_a_row_more(factor: float, num_tokens: int, num_experts: int, rows: int) -> None:
    config = layer_config(num_experts=num_experts, top_k=2, capacity_factor=factor)
    assert rows_within_capacity(config, num_tokens) == rows


@pytest.mark.parametrize("by", ["weight", "position"])
@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 9.0])
@pytest.mark.parametrize(("num_tokens", "ties"), [(0, False), (1, False), (23, False), (40, True)])
def test_the_best_of_each_expert_stay(by: str, factor: float, num_tokens: int, ties: bool) -> None:
    config = layer_config(num_experts=5, top_k=2, capacity_factor=factor, capacity_by=by)
    routing = routing_of(num_tokens, 3, ties=ties)
    limit = rows_within_capacity(config, num_tokens)
    kept, dropped_E = drop_beyond_capacity(routing, config)
    kept.validate()
    want = by_definition(routing, limit, by)
    assert pairs_of(kept) == want
    before = pairs_of(routing)
    assert dropped_E.tolist() == [len(all_) - len(some) for all_, some in zip(before, want, strict=True)]
    if num_tokens == 40 and factor == 0.5:
        other = by_definition(routing, limit, "position" if by == "weight" else "weight")
        assert other != want, "the order matters here"


def test_gradients_reach_what_stays_alone() -> None:
    config = layer_config(num_experts=5, top_k=2, capacity_factor=0.5)
    routing = routing_of(30, 1)
    kept, dropped_E = drop_beyond_capacity(routing, config)
    length = int(kept.offset_E1[-1])
    scale_N = torch.arange(1, length + 1, dtype=torch.float32)
    (kept.weight_N[:length] * scale_N).sum().backward()
    grad_N = routing.weight_N.grad
    assert isinstance(grad_N, Tensor)
    stays = [pair for expert in pairs_of(kept) for pair in expert]
    flat = [pair for expert in pairs_of(routing) for pair in expert]
    experts = [expert for expert, pairs in enumerate(pairs_of(routing)) for _ in pairs]
    kept_experts = [expert for expert, pairs in enumerate(pairs_of(kept)) for _ in pairs]
    scale = {(expert, *pair): float(s) for expert, pair, s in zip(kept_experts, stays, scale_N, strict=True)}
    want = [scale.get((expert, *pair), 0.0) for expert, pair in zip(experts, flat, strict=True)]
    assert grad_N[: len(want)].tolist() == want
    assert int(dropped_E.sum()) == len(flat) - len(stays) > 0


def test_a_factor_must_be_positive_and_alone() -> None:
    with pytest.raises(ValueError, match=r"dispatch.capacity_factor must be positive, got 0"):
        DispatchConfig(capacity_factor=0.0)
    with pytest.raises(
        ValueError, match=r"dispatch.capacity_factor and dispatch.rounding \('nearest'\) both choose rows"
    ):
        DispatchConfig(capacity_factor=1.0, rounding="nearest")
    with pytest.raises(ValueError, match=r"dispatch\.capacity_by must be one of 'weight', 'position', got 'size'"):
        DispatchConfig(capacity_factor=1.0, capacity_by="size")  # type: ignore[arg-type]
