"""Moves the rows of a planned dispatch: out along its hops, and results back.

Shapes: T tokens of a piece, R rows for the experts here, D width, P pairs.
"""

from itertools import pairwise

from torch import Tensor
from torch.nn import functional

from moetrain.mesh.collectives import PendingRows
from moetrain.moe.dispatch.contract import ExpertRows
from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.moe.dispatch.plan import DispatchPlan, Hop
from moetrain.ops import gather_rows, scatter_add_rows


class PlannedPiece:
    """The rows and weights of one piece of a micro-batch; the first hop begins when this is made.

    Collective: all ranks of the group make it, then call ``wait`` and ``combine`` once, in the same order among pieces.
    Both carry gradient.
    """

    def __init__(self, x_TD: Tensor, weight_N: Tensor, plan: DispatchPlan, groups: DispatchGroups) -> None:
        """Begin to send the piece's tokens.

        Args:
            x_TD: tokens.
            weight_N: of the pairs of the routing that was planned.
            plan: where rows go.
            groups: among whom.
        """
        self.plan = plan
        self._groups = groups
        self._num_tokens = x_TD.shape[0]
        self._pending = self._start(plan.hops[0], x_TD, weight_N)

    def wait(self) -> ExpertRows:
        """The rows for the experts here, and their pairs with weights, grouped by expert."""
        plan, groups = self.plan, self._groups
        for hop, following in pairwise(plan.hops):
            x_RD, weight_P1 = self._finish()
            weight_P = gather_rows(weight_P1, hop.recv_pair_P, hop.offset_E1).squeeze(1)
            self._pending = self._start(following, x_RD, weight_P)
        x_RD, weight_P1 = self._finish()
        weight_P1 = groups.gather_over_etp(weight_P1, plan.etp_pairs, "etp_weights")
        x_RD = groups.gather_over_etp(x_RD, plan.etp_rows, "etp_gather")
        weight_P = gather_rows(weight_P1, plan.hops[-1].recv_pair_P, plan.offset_e1).squeeze(1)
        return ExpertRows(x_RD, plan.row_P, weight_P, plan.offset_e1)

    def combine(self, y_RD: Tensor) -> "PlannedCombine":
        """Send each row's result back, up to the last hop, which is only begun."""
        y_RD = self._groups.sum_over_etp(y_RD, self.plan.etp_rows)
        for hop in reversed(self.plan.hops[1:]):
            y_RD = scatter_add_rows(_start_back(hop, y_RD).wait(), hop.send_token_R, num_rows=hop.num_rows)
        hop = self.plan.hops[0]
        return PlannedCombine(_start_back(hop, y_RD), hop, self._num_tokens)

    def _start(self, hop: Hop, x_TD: Tensor, weight_N: Tensor) -> tuple[PendingRows, PendingRows]:
        # Padded messages are full even where this rank has nothing: they are rows of zeros then.
        if x_TD.shape[0] < hop.num_rows:
            x_TD = functional.pad(x_TD, (0, 0, 0, hop.num_rows - x_TD.shape[0]))
        if weight_N.shape[0] == 0 and len(hop.send_pair_P):
            weight_N = functional.pad(weight_N, (0, max(hop.send_pairs)))
        send_P1 = gather_rows(weight_N.unsqueeze(1), hop.send_pair_P)
        send_RD = gather_rows(x_TD, hop.send_token_R)
        return (
            hop.group.start(send_P1, hop.send_pairs, hop.recv_pairs, "weights"),
            hop.group.start(send_RD, hop.send_rows, hop.recv_rows, "dispatch"),
        )

    def _finish(self) -> tuple[Tensor, Tensor]:
        weights, rows = self._pending
        weight_P1 = weights.wait()
        return rows.wait(), weight_P1


class PlannedCombine:
    """Results of one piece, their last hop pending."""

    def __init__(self, rows: PendingRows, hop: Hop, num_tokens: int) -> None:
        self._rows = rows
        self._hop = hop
        self._num_tokens = num_tokens

    def wait(self) -> Tensor:
        """[T, D]: a token's rows added in ascending order of ranks (of nodes, after two hops)."""
        y_TD = scatter_add_rows(self._rows.wait(), self._hop.send_token_R, num_rows=self._hop.num_rows)
        return y_TD[: self._num_tokens]


def _start_back(hop: Hop, y_RD: Tensor) -> PendingRows:
    return hop.group.start(y_RD, hop.recv_rows, hop.send_rows, "combine")
