"""Capacity as its definition reads (GShard, arXiv 2006.16668; Switch, 2101.03961), one expert at a time.

Shapes: T tokens of one domain (one rank's of one micro-batch), E experts.
"""

import math

import torch
from torch import Tensor

from moetrain.config import MoELayerConfig


def keep_within_capacity(
    chosen_TE: Tensor, weight_TE: Tensor, config: MoELayerConfig, slots: int
) -> tuple[Tensor, float]:
    """Drop what an expert was chosen for beyond ceil(factor * K * slots / E) tokens.

    By weight, those of largest weight stay (of equal ones the earlier); by position, the earliest. What stays keeps
    its weight.

    Args:
        chosen_TE: bool.
        weight_TE: 0 where not chosen.
        config: The factor and the order.
        slots: Places for tokens in the domain's micro-batch, padding included.

    Returns:
        The weights, 0 where a token was dropped, and the least gap between a weight that stayed and one that did not.
    """
    assert config.dispatch.capacity_factor is not None
    capacity = math.ceil(config.dispatch.capacity_factor * config.moe.top_k * slots / config.moe.num_experts)
    kept_TE, gap = torch.zeros_like(chosen_TE), float("inf")
    for expert in range(config.moe.num_experts):
        tokens = chosen_TE[:, expert].nonzero()[:, 0].tolist()
        weights = weight_TE[:, expert].tolist()
        if config.dispatch.capacity_by == "weight":
            tokens.sort(key=lambda token: (-weights[token], token))
            if len(tokens) > capacity > 0:
                gap = min(gap, weights[tokens[capacity - 1]] - weights[tokens[capacity]])
        kept_TE[tokens[:capacity], expert] = True
    return torch.where(kept_TE, weight_TE, 0.0), gap
