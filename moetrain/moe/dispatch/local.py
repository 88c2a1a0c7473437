"""Dispatch where all experts are on this rank."""

from dataclasses import dataclass

from torch import Tensor

from moetrain.moe.context import RoutingMemo
from moetrain.moe.dispatch.contract import ExpertRows, Sent, check_experts
from moetrain.moe.routing import Routing


@dataclass(frozen=True, slots=True, eq=False)
class _Here:
    """A piece that has nowhere to go."""

    rows: ExpertRows

    def arrive(self) -> ExpertRows:
        return self.rows

    def leave(self, y_RD: Tensor) -> "_HomeAlready":
        return _HomeAlready(y_RD)


@dataclass(frozen=True, slots=True, eq=False)
class _HomeAlready:
    y_TD: Tensor

    def wait(self) -> Tensor:
        return self.y_TD


class LocalDispatcher:
    """All experts are here: nothing moves and nothing is read."""

    def __init__(self, num_experts: int, rank: int = 0) -> None:
        """``rank`` is this rank's global number, for errors."""
        self._num_experts = num_experts
        self._rank = rank

    def send(self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None) -> Sent:
        """Hand tokens over as rows."""
        check_experts("LocalDispatcher", routing, self._num_experts)
        bad_ranks = None
        if bad_1.device.type == "cpu":  # elsewhere reading it would stop the device's queue
            bad_ranks = (self._rank,) if bool(bad_1.any()) else ()
        rows = ExpertRows(x_TD, routing.token_N, routing.weight_N, routing.offset_E1)
        return Sent((_Here(rows),), bad_ranks)
