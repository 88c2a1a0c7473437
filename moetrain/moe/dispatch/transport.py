"""Rows on their way to experts and back: what a planned dispatch does with data.

Shapes: T tokens of a piece, R rows for the experts here, D width, P pairs.
"""

from itertools import pairwise

from torch import Tensor
from torch.nn import functional

from moetrain.mesh.collectives import RowsUnderWay, gather_rows_of_all, start_all_to_all_rows, sum_rows_of_all
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.dispatch.destinations import DispatchGroups
from moetrain.moe.dispatch.plan import DispatchPlan, Hop
from moetrain.ops import gather_rows, scatter_add_rows


class Travel:
    """The rows and weights of one piece of a micro-batch; the first hop begins when this is made.

    Collective: all ranks of the group make it, then call ``arrive`` and ``leave`` once, in the same order among pieces.
    Both carry gradient.
    """

    def __init__(
        self,
        x_TD: Tensor,
        weight_N: Tensor,
        plan: DispatchPlan,
        groups: DispatchGroups,
        counter: TrafficCounter | None = None,
    ) -> None:
        """Send the piece's tokens on their way.

        Args:
            x_TD: tokens.
            weight_N: of the pairs of the routing that was planned.
            plan: where rows go.
            groups: among whom.
            counter: counts what leaves this rank: "dispatch" and "combine" (rows) and "weights", on a second hop with
                "_inside"; between parts "etp_weights", "etp_gather" (rows) and "etp_sum" (results); their gradients
                under the same names with "_grad".
        """
        self.plan = plan
        self._groups = groups
        self._counter = counter
        self._num_tokens = x_TD.shape[0]
        self._under_way = self._start(plan.hops[0], x_TD, weight_N)

    def arrive(self) -> tuple[Tensor, Tensor]:
        """The rows for the experts here, and the weight of each pair, grouped by expert."""
        plan = self.plan
        for hop, following in pairwise(plan.hops):
            x_RD, weight_P1 = self._finish()
            weight_P = gather_rows(weight_P1, hop.recv_pair_P, hop.offset_E1).squeeze(1)
            self._under_way = self._start(following, x_RD, weight_P)
        x_RD, weight_P1 = self._finish()
        if (parts := self._groups.parts) is not None:
            weight_P1 = gather_rows_of_all(
                weight_P1, plan.part_pairs, parts, counter=self._counter, purpose="etp_weights"
            )
            x_RD = gather_rows_of_all(x_RD, plan.part_rows, parts, counter=self._counter)
        return x_RD, gather_rows(weight_P1, plan.hops[-1].recv_pair_P, plan.offset_e1).squeeze(1)

    def leave(self, y_RD: Tensor) -> "WayHome":
        """Send each row's result back, up to the last hop, which is only begun."""
        if (parts := self._groups.parts) is not None:
            y_RD = sum_rows_of_all(y_RD, self.plan.part_rows, parts, counter=self._counter)
        for hop in reversed(self.plan.hops[1:]):
            y_RD = scatter_add_rows(self._start_home(hop, y_RD).wait(), hop.send_token_R, num_rows=hop.num_rows)
        hop = self.plan.hops[0]
        return WayHome(self._start_home(hop, y_RD), hop, self._num_tokens)

    def _start(self, hop: Hop, x_TD: Tensor, weight_N: Tensor) -> tuple[RowsUnderWay, RowsUnderWay]:
        # Padded messages are full even where this rank has nothing: they are rows of zeros then.
        if x_TD.shape[0] < hop.num_rows:
            x_TD = functional.pad(x_TD, (0, 0, 0, hop.num_rows - x_TD.shape[0]))
        if weight_N.shape[0] == 0 and len(hop.send_pair_P):
            weight_N = functional.pad(weight_N, (0, max(hop.send_pairs)))
        sent_P1 = gather_rows(weight_N.unsqueeze(1), hop.send_pair_P)
        sent_RD = gather_rows(x_TD, hop.send_token_R)
        return (
            self._move(sent_P1, hop.send_pairs, hop.recv_pairs, hop, "weights"),
            self._move(sent_RD, hop.send_rows, hop.recv_rows, hop, "dispatch"),
        )

    def _finish(self) -> tuple[Tensor, Tensor]:
        weights, rows = self._under_way
        weight_P1 = weights.wait()
        return rows.wait(), weight_P1

    def _start_home(self, hop: Hop, y_RD: Tensor) -> RowsUnderWay:
        return self._move(y_RD, hop.recv_rows, hop.send_rows, hop, "combine")

    def _move(self, x_RD: Tensor, send: list[int], recv: list[int], hop: Hop, purpose: str) -> RowsUnderWay:
        return start_all_to_all_rows(x_RD, send, recv, hop.group, counter=self._counter, purpose=purpose + hop.suffix)


class WayHome:
    """Results of one piece on their last hop."""

    def __init__(self, rows: RowsUnderWay, hop: Hop, num_tokens: int) -> None:
        self._rows = rows
        self._hop = hop
        self._num_tokens = num_tokens

    def wait(self) -> Tensor:
        """[T, D]: a token's rows added in ascending order of ranks (of nodes, after two hops)."""
        y_TD = scatter_add_rows(self._rows.wait(), self._hop.send_token_R, num_rows=self._hop.num_rows)
        return y_TD[: self._num_tokens]
