"""Sends rows to where their experts are, and brings results home.

Shapes: T tokens here, R rows for the experts here (a token once per destination rank), D width, N pairs, e experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moetrain.config import NotBuiltYetError
from moetrain.mesh.collectives import TrafficCounter, all_to_all_rows, gather_rows_of_all, sum_rows_of_all
from moetrain.mesh.groups import MeshGroups
from moetrain.moe.context import RoutingMemo, once
from moetrain.moe.dispatch_plan import Destinations, DispatchGroups, DispatchPlan, plan_dispatch
from moetrain.moe.routing import Routing
from moetrain.ops import gather_rows, scatter_add_rows
from moetrain.placement.placement import Placement


@dataclass(frozen=True, slots=True, eq=False)
class Dispatched:
    """What the experts of this rank work on: ``run_experts`` takes the first four.

    Args:
        x_RD: rows.
        row_N: int32, the row of each pair, grouped by local expert.
        weight_N: at least float32, carries gradient back to the rank whose router made it.
        offset_e1: int32, over the experts held here, ascending.
        num_tokens: T, for the way home.
        bad_ranks: global ranks whose router saw NaN or Inf; None where nobody has looked yet.
        plan: splits and indices, None where no row moved.
    """

    x_RD: Tensor
    row_N: Tensor
    weight_N: Tensor
    offset_e1: Tensor
    num_tokens: int
    bad_ranks: tuple[int, ...] | None
    plan: DispatchPlan | None


class Dispatcher(Protocol):
    """Moves rows. A layer calls both methods once per forward, on every rank of the group, for any T."""

    def dispatch(self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None) -> Dispatched:
        """Bring every token to its experts."""

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring results home: [R, D] -> [T, D], a token's rows summed in ascending rank order."""


class LocalDispatcher:
    """All experts are here: nothing moves and nothing is read."""

    def __init__(self, num_experts: int, rank: int = 0) -> None:
        """``rank`` is this rank's global number, for errors."""
        self._num_experts = num_experts
        self._rank = rank

    def dispatch(self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None) -> Dispatched:
        """Hand tokens over as rows."""
        if routing.num_experts != self._num_experts:
            raise ValueError(
                f"LocalDispatcher: routing is over {routing.num_experts} experts, but this dispatcher serves "
                f"{self._num_experts}; give the router and the placement the same number of experts"
            )
        bad_ranks = None
        if bad_1.device.type == "cpu":  # elsewhere reading it would stop the device's queue
            bad_ranks = (self._rank,) if bool(bad_1.any()) else ()
        return Dispatched(
            x_TD, routing.token_N, routing.weight_N, routing.offset_E1, routing.num_tokens, bad_ranks, None
        )

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Rows are tokens."""
        return y_RD


class AllToAllDispatcher:
    """Experts live on the ranks of a group: a token travels once to each rank that holds some of its experts.

    Per layer and micro-batch: one exchange of counts, one device-to-host copy, then all-to-alls of pair metadata
    (int32), weights and rows; one all-to-all brings results back. Weights and rows carry gradient. Where experts have
    parts on several ranks (etp), these gather each other's metadata, weights and rows, and sum their results.
    """

    def __init__(
        self,
        placement: Placement,
        groups: DispatchGroups,
        pool_ranks: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        counter: TrafficCounter | None = None,
    ) -> None:
        """Fix where each expert is reached.

        Args:
            placement: of this layer, over pool ranks.
            groups: the ranks among which rows move.
            pool_ranks: pool rank of each rank of the ep group, in the group's order.
            device: of the tokens.
            counter: counts what leaves this rank: "dispatch" and "combine" (rows), "pairs" (pair metadata) and
                "weights"; between parts "etp_pairs", "etp_weights", "etp_gather" (rows) and "etp_sum" (results);
                their gradients under the same names with "_grad".

        Raises:
            NotBuiltYetError: if an expert is reached outside the group.
        """
        self._groups = groups
        self._counter = counter
        here = pool_ranks[groups.ep.rank()]
        reached = [placement.destination(here, expert) for expert in range(placement.num_experts)]
        outside = sorted(set(reached) - set(pool_ranks))
        if outside:
            raise NotBuiltYetError(
                "placement.quotas", outside, f"send tokens of pool rank {here} to pool ranks {list(pool_ranks)} only"
            )
        held = [placement.experts_of(rank) for rank in pool_ranks]
        self._to = Destinations.of([pool_ranks.index(r) for r in reached], held, groups.ep.rank(), torch.device(device))
        self._global_ranks = tuple(torch.distributed.get_process_group_ranks(groups.counts))

    def dispatch(self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None) -> Dispatched:
        """Send each token once per destination rank, and its weights with it."""
        plan = once(memo, "dispatch", lambda: plan_dispatch(routing, self._to, bad_1, self._groups, self._counter))
        sent_P1 = gather_rows(routing.weight_N.unsqueeze(1), plan.send_pair_P)
        recv_P1 = self._move(sent_P1, plan.send_pairs, plan.recv_pairs, "weights")
        sent_RD = gather_rows(x_TD, plan.send_token_R)
        x_RD = self._move(sent_RD, plan.send_rows, plan.recv_rows, "dispatch")
        if (parts := self._groups.parts) is not None:
            recv_P1 = gather_rows_of_all(recv_P1, plan.part_pairs, parts, counter=self._counter, purpose="etp_weights")
            x_RD = gather_rows_of_all(x_RD, plan.part_rows, parts, counter=self._counter)
        weight_P = gather_rows(recv_P1, plan.recv_pair_P).squeeze(1)
        bad_ranks = tuple(self._global_ranks[rank] for rank in plan.bad_ranks)
        return Dispatched(x_RD, plan.row_P, weight_P, plan.offset_e1, routing.num_tokens, bad_ranks, plan)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Send each row's sum back and add a token's rows in ascending rank order."""
        plan = dispatched.plan
        assert plan is not None, "combine takes what this dispatcher's dispatch gave"
        if (parts := self._groups.parts) is not None:
            y_RD = sum_rows_of_all(y_RD, plan.part_rows, parts, counter=self._counter)
        home_RD = self._move(y_RD, plan.recv_rows, plan.send_rows, "combine")
        return scatter_add_rows(home_RD, plan.send_token_R, num_rows=dispatched.num_tokens)

    def _move(self, x_RD: Tensor, send: list[int], recv: list[int], purpose: str) -> Tensor:
        return all_to_all_rows(x_RD, send, recv, self._groups.ep, counter=self._counter, purpose=purpose)


def make_dispatcher(
    placement: Placement,
    groups: MeshGroups,
    counter: TrafficCounter | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Dispatcher:
    """The dispatcher that a placement needs on this rank: local where this rank holds all it sends to."""
    if groups.size("dispatch") == 1:
        return LocalDispatcher(placement.num_experts, groups.rank)
    among = DispatchGroups(
        ep=groups.group("ep"),
        parts=groups.group("etp") if groups.size("etp") > 1 else None,
        counts=groups.group("dispatch"),
    )
    pool_ranks = tuple(map(groups.mesh.pool_rank, groups.ranks("ep")))
    return AllToAllDispatcher(placement, among, pool_ranks, device=device, counter=counter)
