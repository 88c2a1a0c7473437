"""Dispatch where all experts are on this rank: nothing moves."""

from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.context import RoutingMemo
from moetrain.moe.dispatch.contract import ExpertRows, PendingDispatch, check_experts
from moetrain.moe.routing import Routing
from moetrain.placement.placement import Placement


class LocalDispatcher:
    """All experts are here: nothing moves and nothing is read."""

    def __init__(self, num_experts: int, rank: int = 0) -> None:
        """``rank`` is this rank's global number, for errors."""
        self._num_experts = num_experts
        self._rank = rank

    def placement(self) -> Placement | None:
        """None: nothing moves."""
        return None

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        bad_1: Tensor,
        memo: RoutingMemo | None = None,
        placement: Placement | None = None,
    ) -> PendingDispatch:
        """Hand tokens over as rows."""
        check_experts("LocalDispatcher", routing, self._num_experts)
        bad_ranks = None
        if bad_1.device.type == "cpu":  # elsewhere reading it would stop the device's queue
            bad_ranks = (self._rank,) if bool(bad_1.any()) else ()
        rows = ExpertRows(x_TD, routing.token_N, routing.weight_N, routing.offset_E1)
        return PendingDispatch((_LocalPiece(rows),), bad_ranks)


@dataclass(frozen=True, slots=True, eq=False)
class _LocalPiece:
    """Rows that are here already."""

    rows: ExpertRows

    def wait(self) -> ExpertRows:
        return self.rows

    def combine(self, y_RD: Tensor) -> "_LocalCombine":
        return _LocalCombine(y_RD)


@dataclass(frozen=True, slots=True, eq=False)
class _LocalCombine:
    y_TD: Tensor

    def wait(self) -> Tensor:
        return self.y_TD
