"""What a dispatcher is: it dispatches tokens to the ranks of their experts, and combines what these return.

Shapes: T tokens here, R rows for the experts here (a token once per destination rank), D width, N pairs, e experts,
E experts in all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moetrain.config.errors import require
from moetrain.moe.context import RoutingMemo
from moetrain.moe.routing import Routing
from moetrain.placement.placement import Placement


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """What the experts of this rank work on: the first four arguments of ``run_experts``.

    Args:
        x_RD: rows.
        row_N: int32, the row of each pair, grouped by local expert.
        weight_N: at least float32, carries gradient back to the rank whose router made it.
        offset_e1: int32, over the experts held here, ascending.
    """

    x_RD: Tensor
    row_N: Tensor
    weight_N: Tensor
    offset_e1: Tensor


Experts = Callable[[ExpertRows], Tensor]


class PendingPiece(Protocol):
    """A piece of a micro-batch whose dispatch is pending. Each method is called once, on all ranks."""

    def wait(self) -> ExpertRows:
        """Wait for the rows."""

    def combine(self, y_RD: Tensor) -> "PendingCombine":
        """Begin to combine results: one row per row that was received."""


class PendingCombine(Protocol):
    """Results of one piece whose combine is pending."""

    def wait(self) -> Tensor:
        """[T, D] of the piece, a token's rows summed."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingDispatch:
    """A micro-batch whose dispatch is pending: what is computed before ``combine`` overlaps with it.

    Args:
        pieces: consecutive tokens each; the same number on all ranks.
        bad_ranks: global ranks whose router saw NaN or Inf; None where nobody has looked yet.
    """

    pieces: tuple[PendingPiece, ...]
    bad_ranks: tuple[int, ...] | None

    def combine(self, experts: Experts) -> Tensor:
        """Run the experts on each piece once it is here, and combine their results: [T, D]. Collective."""
        pending = [piece.combine(experts(piece.wait())) for piece in self.pieces]
        results = [piece.wait() for piece in pending]
        return results[0] if len(results) == 1 else torch.cat(results)


class Dispatcher(Protocol):
    """Moves rows. A layer calls it once per forward, on every rank of the group, for any T."""

    def placement(self) -> Placement | None:
        """Where the layer's experts are now; None where all are here and stay."""

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        bad_1: Tensor,
        memo: RoutingMemo | None = None,
        placement: Placement | None = None,
    ) -> PendingDispatch:
        """Begin to dispatch every token to its experts.

        Args:
            x_TD: tokens.
            routing: over all E experts.
            bad_1: int32, above 0 where this rank's router saw NaN or Inf.
            memo: what is replayed under activation checkpointing.
            placement: where experts are in this micro-batch, also when it is recomputed; None: where they are now.
        """


def check_experts(name: str, routing: Routing, num_experts: int) -> None:
    """Refuse a routing over another number of experts than the dispatcher called ``name`` serves."""
    require(
        routing.num_experts == num_experts,
        f"{name}: routing is over {routing.num_experts} experts, but this dispatcher serves {num_experts}; "
        "give the router and the placement the same number of experts",
    )
