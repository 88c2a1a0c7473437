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
from moetrain.moe.dispatch.destinations import Destinations
from moetrain.moe.dispatch.direct import plan_direct
from moetrain.moe.dispatch.groups import DispatchGroups, has_two_levels
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.dispatch.padded import Padding, plan_padded
from moetrain.moe.dispatch.plan import DispatchPlan
from moetrain.moe.dispatch.seats import NodeDestinations, SeatTables, SeatTiles
from moetrain.moe.dispatch.transport import PlannedPiece
from moetrain.moe.dispatch.two_level import plan_two_level
from moetrain.moe.routing import Routing, expert_of_pairs, keep_pairs, take_pairs
from moetrain.placement.current import CurrentPlacement
from moetrain.placement.placement import Placement


class AllToAllDispatcher:
    """Experts live on the ranks of a group: a token is sent once to each rank that serves it for some of its experts.

    Where an expert has several holders for this rank's tokens, pairs are given seats first (``dispatch.seats``).

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
        placed: CurrentPlacement,
        groups: DispatchGroups,
        tables: SeatTables,
        *,
        pieces: int = 1,
        padding: Padding | None = None,
        tile: int | None = None,
    ) -> None:
        """Fix among whom rows move.

        Args:
            placed: where the layer's experts are.
            groups: the ranks among which rows move.
            tables: of placements, for this rank of the ep group; layers share them.
            pieces: into how many a micro-batch is divided.
            padding: bounds of padded messages; None to count instead.
            tile: training routings have whole tiles of each expert's rows, which go to its holders whole.

        Raises:
            ValueError: if an expert's tokens go outside the group.
        """
        require_at_least("AllToAllDispatcher: pieces", pieces, 1)
        self._placed = placed
        self._groups = groups
        self._tables = tables
        self._num_pieces = pieces
        self._padding = padding
        self._tiles = None if tile is None else SeatTiles(tile, groups.ep, groups.counter)
        tables.of(placed.now)
        self._global_ranks = tuple(dist.get_process_group_ranks(groups.counts))

    def placement(self) -> Placement | None:
        """The layer's present one."""
        return self._placed.now

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        bad_1: Tensor,
        memo: RoutingMemo | None = None,
        placement: Placement | None = None,
    ) -> PendingDispatch:
        """Begin to send each token once per destination rank, and its weights with it."""
        placement = placement or self._placed.now
        check_experts("AllToAllDispatcher", routing, placement.num_experts)
        seats = self._tables.of(placement)
        refined = seats.refine(routing, memo, self._tiles)
        pieces = self._pieces(refined, memo)
        plans = once(memo, "dispatch", lambda: self._plan([piece for _, piece in pieces], refined, bad_1, seats.to))
        pending = tuple(
            PlannedPiece(x_TD[tokens], piece.weight_N, plan, self._groups)
            for (tokens, piece), plan in zip(pieces, plans, strict=True)
        )
        bad = plans[0].bad_ranks
        bad_ranks = None if bad is None else tuple(self._global_ranks[rank] for rank in bad)
        return PendingDispatch(pending, bad_ranks)

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

    def _plan(
        self, pieces: list[Routing], whole: Routing, bad_1: Tensor, to: Destinations | NodeDestinations
    ) -> list[DispatchPlan]:
        if self._padding is not None and whole.limit is not None:
            self._padding.check(whole)
            return plan_padded(pieces, to, self._groups, self._padding)
        if isinstance(to, NodeDestinations):
            return plan_two_level(pieces, to, bad_1, self._groups)
        return plan_direct(pieces, to, bad_1, self._groups)


def _places_of(routing: Routing, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Where the pairs of some tokens are in the list, and where each expert's begin among them."""
    is_pair_N = expert_of_pairs(routing.offset_E1, routing.capacity) < routing.num_experts
    return keep_pairs(is_pair_N & (routing.token_N >= start) & (routing.token_N < stop), routing.offset_E1)


def make_seat_tables(
    groups: MeshGroups,
    *,
    device: torch.device | str = "cpu",
    most_held: int | None = None,
    whole_tiles: bool = False,
) -> SeatTables:
    """Tables of placements for this rank of its ep group, in nodes where dispatch has two levels.

    See ``SeatTables`` for the options.
    """
    pool_ranks = tuple(map(groups.mesh.pool_rank, groups.ranks("ep")))
    per_node = groups.size("ep_inside") if has_two_levels(groups) else None
    me = groups.group_rank("ep")
    return SeatTables(pool_ranks, me, device=device, per_node=per_node, most_held=most_held, whole_tiles=whole_tiles)


def make_dispatcher(
    placed: CurrentPlacement | Placement,
    groups: MeshGroups,
    counter: TrafficCounter | None = None,
    *,
    tables: SeatTables | None = None,
    device: torch.device | str = "cpu",
    pieces: int = 1,
    padding: Padding | None = None,
    tile: int | None = None,
) -> Dispatcher:
    """The dispatcher that a layer needs on this rank: local where this rank holds all it sends to.

    See ``AllToAllDispatcher`` for the options, which mean nothing where nothing moves; without ``tables``, shared by
    layers, it has its own on ``device``.
    """
    placed = placed if isinstance(placed, CurrentPlacement) else CurrentPlacement(placed)
    if groups.size("dispatch") == 1:
        return LocalDispatcher(placed.now.num_experts, groups.rank)
    of_dispatch = DispatchGroups.of(groups, counter)
    tables = tables or make_seat_tables(groups, device=device, whole_tiles=tile is not None)
    return AllToAllDispatcher(placed, of_dispatch, tables, pieces=pieces, padding=padding, tile=tile)
