"""Dispatch among the ranks of a group, and the choice of the dispatcher that a placement needs.

Shapes: T tokens here, R rows for the experts here (a token once per destination rank), D width, N pairs.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.errors import require_at_least
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.context import RoutingMemo, once
from moetrain.moe.dispatch.contract import Dispatcher, PendingDispatch, check_experts
from moetrain.moe.dispatch.destinations import Destinations, destinations_in
from moetrain.moe.dispatch.direct import plan_direct
from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.dispatch.padded import Padding, plan_padded
from moetrain.moe.dispatch.plan import DispatchPlan
from moetrain.moe.dispatch.transport import PlannedPiece
from moetrain.moe.dispatch.two_level import NodeDestinations, plan_two_level
from moetrain.moe.routing import Routing, expert_of_pairs, keep_pairs, take_pairs
from moetrain.placement.placement import Placement


class AllToAllDispatcher:
    """Experts live on the ranks of a group: a token is sent once to each rank that holds some of its experts.

    Per layer and micro-batch: one exchange of counts, one device-to-host copy, then all-to-alls of pair metadata
    (int32), weights and rows; one all-to-all combines results. Weights and rows carry gradient. Where experts have
    shards on several ranks (etp), these gather each other's metadata, weights and rows, and sum their results. Where
    the groups have two levels, rows go to a node first and to its ranks from there (``dispatch.two_level``).

    With padding, routings that know their limit are sent in messages of fixed size: no counts, no copy
    (``dispatch.padded``).

    In several pieces, rows of one move while the experts work on another; all still share one exchange of counts.
    """

    def __init__(
        self,
        placement: Placement,
        groups: DispatchGroups,
        pool_ranks: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        pieces: int = 1,
        padding: Padding | None = None,
    ) -> None:
        """Fix where each expert is.

        Args:
            placement: of this layer, over pool ranks.
            groups: the ranks among which rows move.
            pool_ranks: pool rank of each rank of the ep group, in the group's order.
            device: of the tokens.
            pieces: into how many a micro-batch is divided.
            padding: bounds of padded messages; None to count instead.

        Raises:
            NotBuiltYetError: if an expert's tokens go outside the group.
        """
        require_at_least("AllToAllDispatcher: pieces", pieces, 1)
        self._groups = groups
        self._num_experts = placement.num_experts
        self._num_pieces = pieces
        self._padding = padding
        me, device = groups.ep.rank(), torch.device(device)
        self._to: Destinations | NodeDestinations
        if groups.inside is not None:
            self._to = NodeDestinations.of(placement, pool_ranks, me, groups.inside.size(), device)
        else:
            held = [placement.experts_of(rank) for rank in pool_ranks]
            self._to = Destinations.of(destinations_in(placement, pool_ranks, pool_ranks[me]), held, me, device)
        self._global_ranks = tuple(dist.get_process_group_ranks(groups.counts))

    def dispatch(
        self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None
    ) -> PendingDispatch:
        """Begin to send each token once per destination rank, and its weights with it."""
        check_experts("AllToAllDispatcher", routing, self._num_experts)
        pieces = self._pieces(routing, memo)
        plans = once(memo, "dispatch", lambda: self._plan([piece for _, piece in pieces], routing, bad_1))
        pending = tuple(
            PlannedPiece(x_TD[tokens], piece.weight_N, plan, self._groups)
            for (tokens, piece), plan in zip(pieces, plans, strict=True)
        )
        bad = plans[0].bad_ranks
        return PendingDispatch(pending, None if bad is None else tuple(self._global_ranks[rank] for rank in bad))

    def _pieces(self, routing: Routing, memo: RoutingMemo | None) -> list[tuple[slice, Routing]]:
        """Consecutive tokens and their pairs; pieces of few tokens may be empty."""
        if self._num_pieces == 1:
            return [(slice(None), routing)]
        num_tokens, count = routing.num_tokens, self._num_pieces
        bounds = [(i * num_tokens // count, (i + 1) * num_tokens // count) for i in range(count)]
        places = once(memo, "pieces", lambda: [_places_of(routing, start, stop) for start, stop in bounds])
        pieces = []
        for (start, stop), (place_N, offset_E1) in zip(bounds, places, strict=True):
            limit = None if routing.limit is None else min(routing.limit, stop - start)
            taken = take_pairs(routing, place_N, offset_E1, limit)
            gid_T2 = routing.token_gid_T2[start:stop]
            piece = replace(taken, token_N=taken.token_N - start, token_gid_T2=gid_T2, num_tokens=stop - start)
            pieces.append((slice(start, stop), piece))
        return pieces

    def _plan(self, pieces: list[Routing], whole: Routing, bad_1: Tensor) -> list[DispatchPlan]:
        if self._padding is not None and whole.limit is not None:
            self._padding.check(whole)
            return plan_padded(pieces, self._to, self._groups, self._padding)
        if isinstance(self._to, NodeDestinations):
            return plan_two_level(pieces, self._to, bad_1, self._groups)
        return plan_direct(pieces, self._to, bad_1, self._groups)


def _places_of(routing: Routing, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Where the pairs of some tokens are in the list, and where each expert's begin among them."""
    is_pair_N = expert_of_pairs(routing.offset_E1, routing.capacity) < routing.num_experts
    return keep_pairs(is_pair_N & (routing.token_N >= start) & (routing.token_N < stop), routing.offset_E1)


def make_dispatcher(
    placement: Placement,
    groups: MeshGroups,
    counter: TrafficCounter | None = None,
    *,
    device: torch.device | str = "cpu",
    pieces: int = 1,
    padding: Padding | None = None,
) -> Dispatcher:
    """The dispatcher that a placement needs on this rank: local where this rank holds all it sends to.

    See ``AllToAllDispatcher`` for the options, which mean nothing where nothing moves.
    """
    if groups.size("dispatch") == 1:
        return LocalDispatcher(placement.num_experts, groups.rank)
    pool_ranks = tuple(map(groups.mesh.pool_rank, groups.ranks("ep")))
    of_dispatch = DispatchGroups.of(groups, counter)
    return AllToAllDispatcher(placement, of_dispatch, pool_ranks, device=device, pieces=pieces, padding=padding)
