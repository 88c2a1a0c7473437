"""What a rule is: it changes a routing after the router. Shapes: T tokens, E experts."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moetrain.moe.context import MoEContext, RoutingMemo
from moetrain.moe.routing import Routing


@dataclass(frozen=True, slots=True, eq=False)
class RuleOutcome:
    """A changed routing, and how many pairs came and went on this rank (int64 [E])."""

    routing: Routing
    added_E: Tensor
    dropped_E: Tensor


class RoutingRule(Protocol):
    """Changes the routing of a training micro-batch; evaluation keeps the router's exact choice.

    The router's counts, and with them the balance loss and selection biases, are of its choices before any rule. A
    layer applies its rules one after another; one may serve many layers, so it keeps nothing between calls.
    """

    def apply(
        self, routing: Routing, logits_TE: Tensor, ctx: MoEContext, layer_idx: int, memo: RoutingMemo | None = None
    ) -> RuleOutcome:
        """Change one micro-batch's routing; every rank of the dispatch group calls it, for any T.

        Args:
            routing: the router's choice, or what the rule before made of it.
            logits_TE: the router's; fillers' weights carry gradient to them.
            ctx: the micro-batch.
            layer_idx: sets the layers' random draws apart.
            memo: see ``RoutingMemo``; decisions are made, and whatever they need is exchanged, once.
        """
