"""What a router is: a linear score of each token, and a method that chooses by these scores.

What is done about unbalanced choices (losses, biases, what is remembered of other steps) is ``moe.balance``'s business,
what changes a choice afterwards that of ``moe.rules``. Shapes: T tokens, D width, E experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.moe.context import MoEContext
from moetrain.moe.routing import Routing


@dataclass(frozen=True, slots=True, eq=False)
class RouterStatistics:
    """How one layer's choice for one micro-batch is spread over experts.

    Args:
        count_E: int64, choices per expert among this micro-batch's valid tokens.
        prob_sum_E: at least float32, each expert's probability summed over valid tokens; carries gradient.
        bad_1: int32, above 0 where a logit was NaN or Inf.
    """

    count_E: Tensor
    prob_sum_E: Tensor
    bad_1: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RouterOutput:
    """The choice of one layer for one micro-batch.

    Args:
        routing: the pairs; its weights carry gradient to the logits.
        logits_TE: at least float32.
        statistics: of the choice.
    """

    routing: Routing
    logits_TE: Tensor
    statistics: RouterStatistics


class RoutingMethod(Protocol):
    """A way to choose. One serves all layers, so it keeps nothing between calls."""

    def choose(self, logits_TE: Tensor, ctx: MoEContext, bias_E: Tensor | None) -> tuple[Routing, RouterStatistics]:
        """Choose experts for every valid token of the micro-batch, which is the domain of methods that look at sets.

        Args:
            logits_TE: at least float32; T may be 0.
            ctx: the micro-batch.
            bias_E: added to scores for selection only, or None; of the logits' type.
        """


class Router(nn.Module):
    """A linear router in at least float32. ``weight`` [E, D] is zero until the model fills it."""

    def __init__(self, num_experts: int, width: int, method: RoutingMethod) -> None:
        """``method`` chooses by what the weight scores."""
        super().__init__()
        self.method = method
        self.weight = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x_TD: Tensor, ctx: MoEContext, bias_E: Tensor | None = None) -> RouterOutput:
        """Choose experts for every valid token.

        Under activation checkpointing the choice is saved (``saved_ops``), so that a recomputation replays it.

        Args:
            x_TD: tokens, any floating dtype.
            ctx: the micro-batch.
            bias_E: added to scores for selection only (loss-free balancing), or None.
        """
        at_least_fp32 = torch.promote_types(torch.promote_types(x_TD.dtype, self.weight.dtype), torch.float32)
        logits_TE = functional.linear(x_TD.to(at_least_fp32), self.weight.to(at_least_fp32))
        routing, statistics = self.method.choose(logits_TE, ctx, None if bias_E is None else bias_E.to(at_least_fp32))
        return RouterOutput(routing, logits_TE, statistics)
