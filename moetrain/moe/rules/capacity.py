"""Capacity: an expert takes at most so many tokens of a rank, the rest of its choices are dropped (GShard, 2006.16668).

Its domain is one rank's tokens of one micro-batch, so that nothing has to be exchanged to decide; under tensor
parallelism these are the tokens that the rank has between layers. Another split of the batch drops other choices; the
one-process oracle applies the rule per domain. Training only: evaluation drops nothing. The router's counts are of its
choices before.

Shapes: T tokens (places, padding included), E experts, K experts per token, N pairs (capacity of the list).
"""

import math

import torch
from torch import Tensor

from moetrain.config import MoELayerConfig
from moetrain.moe.context import MoEContext, RoutingMemo, once
from moetrain.moe.routing import Routing, expert_of_pairs, keep_pairs, take_pairs
from moetrain.moe.rules.contract import RuleOutcome


def rows_within_capacity(config: MoELayerConfig, num_tokens: int) -> int:
    """The most tokens of one rank and micro-batch that an expert takes: ceil(factor * K * T / E).

    >>> from moetrain.config import DispatchConfig, MoEConfig
    >>> dispatch = DispatchConfig(capacity_factor=1.25)
    >>> rows_within_capacity(MoELayerConfig(moe=MoEConfig(num_experts=8, top_k=2), dispatch=dispatch), 64)
    20
    """
    assert config.dispatch.capacity_factor is not None
    return math.ceil(config.dispatch.capacity_factor * config.moe.top_k * num_tokens / config.moe.num_experts)


class Capacity:
    """Drops what is beyond ``dispatch.capacity_factor``."""

    def __init__(self, config: MoELayerConfig) -> None:
        """``config`` has the factor, and whether the largest weights stay or the earliest tokens."""
        self._config = config

    def apply(
        self, routing: Routing, logits_TE: Tensor, ctx: MoEContext, layer_idx: int, memo: RoutingMemo | None = None
    ) -> RuleOutcome:
        """See ``RoutingRule``; nothing is exchanged."""
        kept, dropped_E = drop_beyond_capacity(routing, self._config, memo)
        return RuleOutcome(kept, torch.zeros_like(dropped_E), dropped_E)


def drop_beyond_capacity(
    routing: Routing, config: MoELayerConfig, memo: RoutingMemo | None = None
) -> tuple[Routing, Tensor]:
    """The pairs that stay, in the order they had, and how many of each expert went (int64 [E]). Waits for nothing.

    What stays keeps its weight: nothing is renormalised.

    Args:
        routing: The router's choice.
        config: Its factor, and whether the largest weights stay or the earliest tokens.
        memo: See ``RoutingMemo``; the decision is made once.
    """
    limit = rows_within_capacity(config, routing.num_tokens)
    by_weight = config.dispatch.capacity_by == "weight"
    place_N, offset_E1 = once(memo, "capacity", lambda: _decide(routing, limit, by_weight))
    dropped_E = (routing.offset_E1.diff() - offset_E1.diff()).long()
    return take_pairs(routing, place_N, offset_E1, limit), dropped_E


@torch.no_grad()
def _decide(routing: Routing, limit: int, by_weight: bool) -> tuple[Tensor, Tensor]:
    """Which pairs stay (their places, int32 [N], 0 beyond their number), and where each expert's begin."""
    index_N = torch.arange(routing.capacity, device=routing.token_N.device)
    expert_N = expert_of_pairs(routing.offset_E1, routing.capacity)
    first_N = torch.cat((routing.offset_E1, routing.offset_E1[-1:]))[expert_N]
    if by_weight:
        # Two stable sorts: heavier pairs first, then by expert; earlier tokens come first among equal weights.
        weight_N = torch.where(expert_N < routing.num_experts, routing.weight_N, -torch.inf)
        order_N = weight_N.argsort(descending=True, stable=True)
        order_N = order_N[expert_N[order_N].argsort(stable=True)]
        rank_N = torch.empty_like(index_N).scatter_(0, order_N, index_N) - first_N
    else:
        rank_N = index_N - first_N
    stays_N = (rank_N < limit) & (expert_N < routing.num_experts)
    return keep_pairs(stays_N, routing.offset_E1)
