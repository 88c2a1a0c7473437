"""Sends rows to where their experts are, and brings results home.

Shapes: T tokens here, R rows for the experts here (a token once per destination rank), D width, N pairs, e experts,
E experts in all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.errors import require, require_at_least
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.context import RoutingMemo, once
from moetrain.moe.dispatch_plan import Destinations, DispatchGroups, DispatchPlan, destinations_in, plan_direct
from moetrain.moe.padded import Padding, plan_padded
from moetrain.moe.routing import Routing, expert_of_pairs, keep_pairs, take_pairs
from moetrain.moe.travel import Travel
from moetrain.moe.two_level import NodeDestinations, plan_two_level
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


class Piece(Protocol):
    """A part of a micro-batch that is on its way to experts. Each method is called once, on all ranks."""

    def arrive(self) -> ExpertRows:
        """Wait for the rows."""

    def leave(self, y_RD: Tensor) -> "Home":
        """Begin to bring results home: one row per row that came."""


class Home(Protocol):
    """Results on their way home."""

    def wait(self) -> Tensor:
        """[T, D] of the piece, a token's rows summed."""


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A micro-batch on its way: what is computed before ``through`` overlaps with the journey.

    Args:
        pieces: consecutive tokens each; the same number on all ranks.
        bad_ranks: global ranks whose router saw NaN or Inf; None where nobody has looked yet.
    """

    pieces: tuple[Piece, ...]
    bad_ranks: tuple[int, ...] | None

    def through(self, experts: Experts) -> Tensor:
        """Run the experts on each piece as it arrives and bring results home: [T, D]. Collective."""
        homes = [piece.leave(experts(piece.arrive())) for piece in self.pieces]
        results = [home.wait() for home in homes]
        return results[0] if len(results) == 1 else torch.cat(results)


class Dispatcher(Protocol):
    """Moves rows. A layer calls it once per forward, on every rank of the group, for any T."""

    def send(self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None) -> Sent:
        """Send every token on its way to its experts.

        Args:
            x_TD: tokens.
            routing: over all E experts.
            bad_1: int32, above 0 where this rank's router saw NaN or Inf.
            memo: what is replayed under activation checkpointing.
        """


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
        _check_experts("LocalDispatcher", routing, self._num_experts)
        bad_ranks = None
        if bad_1.device.type == "cpu":  # elsewhere reading it would stop the device's queue
            bad_ranks = (self._rank,) if bool(bad_1.any()) else ()
        rows = ExpertRows(x_TD, routing.token_N, routing.weight_N, routing.offset_E1)
        return Sent((_Here(rows),), bad_ranks)


def _check_experts(name: str, routing: Routing, num_experts: int) -> None:
    require(
        routing.num_experts == num_experts,
        f"{name}: routing is over {routing.num_experts} experts, but this dispatcher serves {num_experts}; "
        "give the router and the placement the same number of experts",
    )


class AllToAllDispatcher:
    """Experts live on the ranks of a group: a token travels once to each rank that holds some of its experts.

    Per layer and micro-batch: one exchange of counts, one device-to-host copy, then all-to-alls of pair metadata
    (int32), weights and rows; one all-to-all brings results back. Weights and rows carry gradient. Where experts have
    parts on several ranks (etp), these gather each other's metadata, weights and rows, and sum their results. Where
    the groups have two levels, rows go to a node first and to its ranks from there (``moe.two_level``).

    With padding, routings that know their limit travel in messages of fixed size: no counts, no copy (``moe.padded``).

    In several pieces, rows of one travel while the experts work on another; all still share one exchange of counts.
    """

    def __init__(
        self,
        placement: Placement,
        groups: DispatchGroups,
        pool_ranks: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        counter: TrafficCounter | None = None,
        pieces: int = 1,
        padding: Padding | None = None,
    ) -> None:
        """Fix where each expert is reached.

        Args:
            placement: of this layer, over pool ranks.
            groups: the ranks among which rows move.
            pool_ranks: pool rank of each rank of the ep group, in the group's order.
            device: of the tokens.
            counter: counts what leaves this rank: pair metadata as "pairs" ("etp_pairs"), the rest as in ``Travel``.
            pieces: into how many a micro-batch is cut.
            padding: bounds of padded messages; None to count instead.

        Raises:
            NotBuiltYetError: if an expert is reached outside the group.
        """
        require_at_least("AllToAllDispatcher: pieces", pieces, 1)
        self._groups = groups
        self._counter = counter
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

    def send(self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None) -> Sent:
        """Send each token once per destination rank, and its weights with it."""
        _check_experts("AllToAllDispatcher", routing, self._num_experts)
        pieces = self._cut(routing, memo)
        plans = once(memo, "dispatch", lambda: self._plan([piece for _, piece in pieces], routing, bad_1))
        travelling = tuple(
            _TravellingPiece(Travel(x_TD[tokens], piece.weight_N, plan, self._groups, self._counter))
            for (tokens, piece), plan in zip(pieces, plans, strict=True)
        )
        bad = plans[0].bad_ranks
        return Sent(travelling, None if bad is None else tuple(self._global_ranks[rank] for rank in bad))

    def _cut(self, routing: Routing, memo: RoutingMemo | None) -> list[tuple[slice, Routing]]:
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
            return plan_padded(pieces, self._to, self._groups, self._padding, self._counter)
        if isinstance(self._to, NodeDestinations):
            return plan_two_level(pieces, self._to, bad_1, self._groups, self._counter)
        return plan_direct(pieces, self._to, bad_1, self._groups, self._counter)


def _places_of(routing: Routing, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Where the pairs of some tokens are in the list, and where each expert's begin among them."""
    is_pair_N = expert_of_pairs(routing.offset_E1, routing.capacity) < routing.num_experts
    return keep_pairs(is_pair_N & (routing.token_N >= start) & (routing.token_N < stop), routing.offset_E1)


@dataclass(frozen=True, slots=True, eq=False)
class _TravellingPiece:
    travel: Travel

    def arrive(self) -> ExpertRows:
        x_RD, weight_N = self.travel.arrive()
        return ExpertRows(x_RD, self.travel.plan.row_P, weight_N, self.travel.plan.offset_e1)

    def leave(self, y_RD: Tensor) -> Home:
        return self.travel.leave(y_RD)


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
    return AllToAllDispatcher(
        placement,
        DispatchGroups.of(groups),
        pool_ranks,
        device=device,
        counter=counter,
        pieces=pieces,
        padding=padding,
    )
