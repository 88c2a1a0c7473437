"""A placement as the ranks among which rows move see it: to which seat a pair goes, and where that is.

A seat is (expert, holder). Where this rank's tokens for an expert may all go to one holder only, for every expert, as
under expert parallelism, experts themselves are the destinations; elsewhere a routing over experts is refined to one
over seats first (``assign_seats``), and all that follows takes seats for experts.

Where token rounding has made whole tiles of each expert's rows, whole tiles go to its seats. All sources' pairs of an
expert stand in a line, sources ascending, and the line is cut at multiples of the tile, holders ascending: neighbours
meet, and each source knows its part from the counts alone:

    pairs of sources     0: 3    1: 5    2: 8        16 pairs, tile 4
    seats want           0: 6    1: 3    3: 7        by their shares; cut at 8, 8, 16
    seats get            0: 3 + 5        3: 8        whole tiles; source 1 sends 5 pairs to holder 0

Shapes: E experts, Z seats in the group, X = E or Z destinations, W ranks of the group (sources), V nodes, J seats of a
node.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from moetrain.config.errors import require
from moetrain.mesh.collectives import all_gather_stack
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.context import RoutingMemo, once
from moetrain.moe.dispatch.destinations import Destinations
from moetrain.moe.routing import Routing, take_pairs
from moetrain.ops import assign_seats
from moetrain.placement.placement import Placement

SPLIT = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class NodeDestinations:
    """Where destinations are, seen three ways.

    Args:
        ranks: over the ranks of the group, all destinations.
        nodes: over its nodes, all destinations; ``max_local`` is J.
        inside: over the ranks of this node, the J seats of this node (fewer ones are filled up, and never chosen).
    """

    ranks: Destinations
    nodes: Destinations
    inside: Destinations


@dataclass(frozen=True, slots=True, eq=False)
class SeatChoice:
    """What ``assign_seats`` needs of a placement, on the device.

    Args:
        offset_E1, holder_Z, share_Z: the seats in the group, and this rank's shares of them.
        num_groups, source, domain_size: of the placement; ``source`` is this rank's group of the pool.
        split_WZ: int32, for whole tiles: what part of rank w's pairs of its expert a seat should get, in units of
            1 / SPLIT, so that every rank and device adds up the same; else None.
        expert_Z: int64, the expert of each seat.
    """

    offset_E1: Tensor
    holder_Z: Tensor
    share_Z: Tensor
    num_groups: int
    source: int
    domain_size: int
    split_WZ: Tensor | None
    expert_Z: Tensor

    @torch.no_grad()
    def shares_in_tiles(self, count_WE: Tensor, group_rank: int, tile: int) -> Tensor:
        """int32 [Z]: how many of this rank's pairs each seat gets, so that it gets whole tiles from all ranks together.

        An expert whose pairs are no whole tiles, because too few tokens chose it, has one seat with the rest.

        Args:
            count_WE: int64, pairs of each rank.
            group_rank: this rank.
            tile: rows of one.
        """
        assert self.split_WZ is not None
        wanted_Z = (count_WE[:, self.expert_Z] * self.split_WZ).sum(0)
        first_Z, last_Z = self.offset_E1[:-1].long()[self.expert_Z], self.offset_E1[1:].long()[self.expert_Z] - 1
        through_Z = wanted_Z.cumsum(0)
        before_Z = (through_Z - wanted_Z)[first_Z]
        index_Z = torch.arange(len(wanted_Z), device=wanted_Z.device)
        total_Z = count_WE.sum(0)[self.expert_Z]
        unit = tile * SPLIT
        cut_Z = (2 * (through_Z - before_Z) + unit).div(2 * unit, rounding_mode="floor") * tile  # to the nearest
        cut_Z = torch.where(index_Z == last_Z, total_Z, torch.minimum(cut_Z, total_Z))
        start_Z = torch.where(index_Z == first_Z, 0, cut_Z.roll(1))
        mine_Z = count_WE[group_rank, self.expert_Z]
        from_Z = (count_WE.cumsum(0) - count_WE)[group_rank, self.expert_Z]
        low_Z, high_Z = torch.maximum(start_Z, from_Z), torch.minimum(cut_Z, from_Z + mine_Z)
        return (high_Z - low_Z).clamp(min=0).int()


@dataclass(frozen=True, slots=True, eq=False)
class DispatchSeats:
    """The seats of one placement, for one rank of the group.

    Args:
        placement: whose seats they are.
        to: where the destinations are; with nodes where rows move in two hops.
        choice: how pairs get seats; None where destinations are experts.
    """

    placement: Placement
    to: Destinations | NodeDestinations
    choice: SeatChoice | None

    def num_bytes(self) -> int:
        """Of the tables on the device; the placement's own lists are not counted."""
        to, choice = self.to, self.choice
        parts = (to,) if isinstance(to, Destinations) else (to.ranks, to.nodes, to.inside)
        tensors = [table for part in parts for table in (part.rank_E, part.local_E)]
        if choice is not None:
            tensors += [choice.offset_E1, choice.holder_Z, choice.share_Z, choice.expert_Z]
            tensors += [] if choice.split_WZ is None else [choice.split_WZ]
        return sum(one.nbytes for one in tensors)

    def refine(self, routing: Routing, memo: RoutingMemo | None, tiles: "SeatTiles | None" = None) -> Routing:
        """The routing over destinations in place of experts. Decided once, and replayed from ``memo``.

        Args:
            routing: over experts.
            memo: see ``RoutingMemo``.
            tiles: seats get whole ones, for which all ranks of the group exchange counts; None for any number of rows.
        """
        choice = self.choice
        if choice is None:
            return routing
        pair_N, offset_Z1 = once(memo, "seats", lambda: _assign(routing, choice, tiles))
        return take_pairs(routing, pair_N, offset_Z1, routing.limit)


@dataclass(frozen=True, slots=True, eq=False)
class SeatTiles:
    """How seats get whole tiles of rows: by the counts of all ranks of ``group``."""

    tile: int
    group: ProcessGroup
    counter: TrafficCounter | None = None

    def shares(self, routing: Routing, choice: SeatChoice) -> Tensor:
        """int32 [Z]: this rank's pairs for each seat. Collective."""
        count_WE = all_gather_stack(routing.offset_E1.diff(), self.group, counter=self.counter, purpose="tiles")
        return choice.shares_in_tiles(count_WE.long(), self.group.rank(), self.tile)


@torch.no_grad()
def _assign(routing: Routing, choice: SeatChoice, tiles: SeatTiles | None) -> tuple[Tensor, Tensor]:
    return assign_seats(
        routing.token_N,
        routing.offset_E1,
        choice.offset_E1,
        choice.holder_Z,
        choice.share_Z if tiles is None else tiles.shares(routing, choice),
        num_tokens=routing.num_tokens,
        num_groups=choice.num_groups,
        source=choice.source,
        domain_size=choice.domain_size,
    )


class SeatTables:
    """Makes ``DispatchSeats`` of placements for one rank of a dispatch group, and keeps the last ones.

    Layers share it, so that layers with one placement share its tables.
    """

    def __init__(
        self,
        pool_ranks: Sequence[int],
        group_rank: int,
        *,
        device: torch.device | str = "cpu",
        per_node: int | None = None,
        most_held: int | None = None,
        whole_tiles: bool = False,
        num_kept: int = 128,
        max_bytes: int = 256 << 20,
    ) -> None:
        """Fix the ranks among which rows move.

        Args:
            pool_ranks: pool rank of each rank of the group, in the group's order; all have the same shard.
            group_rank: this rank's index among them.
            device: of the tokens.
            per_node: for two levels, so many consecutive ranks of the group share a node.
            most_held: no placement lets a rank hold more experts; None to look at each. Padded messages are sized by
                it, so that they do not change with the placement.
            whole_tiles: seats get whole tiles of rows (``SeatTiles``).
            num_kept: placements whose tables are kept, if they have no more than ``max_bytes`` together; the last one
                is kept whatever it has.
            max_bytes: of the tables that are kept: for whole tiles they grow with ranks times seats.
        """
        self._pool_ranks = tuple(pool_ranks)
        self._group_rank = group_rank
        self._device = torch.device(device)
        self._per_node = per_node
        self._most_held = most_held
        self._whole_tiles = whole_tiles
        self._num_kept = num_kept
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[str, DispatchSeats] = OrderedDict()

    def of(self, placement: Placement) -> DispatchSeats:
        """The tables of a placement.

        Raises:
            ValueError: it would send this rank's tokens outside the group, or a rank holds more than ``most_held``.
        """
        key = placement.content_hash()
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = self._make(placement)
            self._num_bytes += found.num_bytes()
            while len(self._kept) > 1 and (len(self._kept) > self._num_kept or self._num_bytes > self._max_bytes):
                self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes()
        else:
            self._kept.move_to_end(key)
        return found

    def _make(self, placement: Placement) -> DispatchSeats:
        seats = _GroupSeats.of(placement, self._pool_ranks, self._group_rank)
        most_held = seats.most_held(self._most_held)
        single = seats.only_seats(self._whole_tiles)
        picked = torch.arange(len(seats.rank_Z)) if single is None else single
        to: Destinations | NodeDestinations
        to = ranks = seats.over_ranks(picked, most_held, self._device)
        if self._per_node is not None:
            fixed = None if self._most_held is None else self._per_node * self._most_held
            to = seats.over_nodes(picked, ranks, self._per_node, fixed, self._device)
        choice = None if single is not None else seats.choice(self._device, self._whole_tiles)
        return DispatchSeats(placement, to, choice)


@dataclass(frozen=True, slots=True, eq=False)
class _GroupSeats:
    """The seats of a placement whose holders are in the group, on the host; the same on all of its ranks but shares.

    Args:
        placement: of all seats.
        source: this rank's group of the pool.
        group_rank: this rank's index in the dispatch group.
        num_ranks: W.
        groups_W: the group of the pool that each rank is of.
        expert_Z, holder_Z, share_Z: of each seat, as in the placement.
        rank_Z: index in the group of the holder.
    """

    placement: Placement
    source: int
    group_rank: int
    num_ranks: int
    groups_W: Tensor
    expert_Z: Tensor
    holder_Z: Tensor
    share_Z: Tensor
    rank_Z: Tensor

    @staticmethod
    def of(placement: Placement, pool_ranks: tuple[int, ...], group_rank: int) -> "_GroupSeats":
        groups = torch.tensor(pool_ranks) // placement.num_shards
        rank_G = torch.full((placement.num_groups,), -1).scatter_(0, groups, torch.arange(len(groups)))
        source = int(groups[group_rank])
        rank_Z, share_Z = rank_G[placement.holder_Z.long()], placement.shares(source)
        outside = placement.holder_Z[(rank_Z < 0) & (share_Z > 0)].unique().tolist()
        require(
            not outside,
            f"dispatch: a placement must send the tokens of group {source} of the pool to groups among which rows "
            f"move, {groups.tolist()}, but has shares for {outside[:8]}; let rows move over all of the pool",
        )
        is_here_Z = rank_Z >= 0
        lists = (placement.expert_Z, placement.holder_Z, share_Z, rank_Z)
        expert_Z, holder_Z, share_Z, rank_Z = (one[is_here_Z] for one in lists)
        return _GroupSeats(placement, source, group_rank, len(groups), groups, expert_Z, holder_Z, share_Z, rank_Z)

    def most_held(self, limit: int | None) -> int:
        """The most experts of a rank of the group, or ``limit`` where that is given."""
        most = int(torch.bincount(self.rank_Z, minlength=self.num_ranks).max())
        require(
            limit is None or most <= limit,
            f"dispatch: messages are sized for at most {limit} experts on a rank, but a placement has {most} on one; "
            "plan within the slots",
        )
        return most if limit is None else limit

    def only_seats(self, whole_tiles: bool) -> Tensor | None:
        """Of each expert the one seat that this rank's tokens take; None where some expert has several.

        Whole tiles may go to any seat, whatever this rank's shares.
        """
        (open_Z,) = (torch.ones_like(self.share_Z) if whole_tiles else self.share_Z).nonzero(as_tuple=True)
        return open_Z if len(open_Z) == self.placement.num_experts else None

    def choice(self, device: torch.device, whole_tiles: bool) -> SeatChoice:
        """What ``assign_seats`` needs."""
        count_E = torch.bincount(self.expert_Z, minlength=self.placement.num_experts)
        offset_E1 = torch.cat((count_E.new_zeros(1), count_E.cumsum(0))).int()
        return SeatChoice(
            offset_E1.to(device),
            self.holder_Z.to(device),
            self.share_Z.to(device),
            num_groups=self.placement.num_groups,
            source=self.source,
            domain_size=self.placement.domain_size,
            split_WZ=self._split_WZ().to(device) if whole_tiles else None,
            expert_Z=self.expert_Z.long().to(device),
        )

    def _split_WZ(self) -> Tensor:  # noqa: N802
        """int32 [W, Z]: the part of each rank's pairs of an expert that a seat should get, times SPLIT."""
        rank_G = torch.full((self.placement.num_groups,), -1).scatter_(0, self.groups_W, torch.arange(self.num_ranks))
        (places_Z,) = (rank_G[self.placement.holder_Z.long()] >= 0).nonzero(as_tuple=True)
        share_WZ = torch.stack([self.placement.shares(group)[places_Z] for group in self.groups_W.tolist()]).long()
        total_WE = torch.zeros(self.num_ranks, self.placement.num_experts, dtype=torch.int64)
        total_WE.index_add_(1, self.expert_Z.long(), share_WZ)
        return (share_WZ * SPLIT).div(total_WE[:, self.expert_Z.long()], rounding_mode="floor").int()

    def over_ranks(self, picked_X: Tensor, most_held: int, device: torch.device) -> Destinations:
        """Where the picked seats are among the ranks of the group."""
        local_Z = _index_inside(self.rank_Z)
        return Destinations(
            rank_E=self.rank_Z[picked_X].to(device, torch.int32),
            local_E=local_Z[picked_X].to(device, torch.int32),
            max_local=most_held,
            num_local=int((self.rank_Z == self.group_rank).sum()),
            num_ranks=self.num_ranks,
        )

    def over_nodes(
        self, picked_X: Tensor, ranks: Destinations, per_node: int, most_seats: int | None, device: torch.device
    ) -> NodeDestinations:
        """The same with nodes of ``per_node`` ranks, which have ``most_seats`` (None to look)."""
        node_Z, node = self.rank_Z // per_node, self.group_rank // per_node
        index_Z = _index_inside(node_Z)
        num_nodes = self.num_ranks // per_node
        if most_seats is None:
            most_seats = int(torch.bincount(node_Z, minlength=num_nodes).max())
        nodes = Destinations(
            rank_E=node_Z[picked_X].to(device, torch.int32),
            local_E=index_Z[picked_X].to(device, torch.int32),
            max_local=most_seats,
            num_local=int((node_Z == node).sum()),
            num_ranks=num_nodes,
        )
        here_Z = node_Z == node
        filled = nodes.max_local - int(here_Z.sum())
        rank_J = functional.pad(self.rank_Z[here_Z] % per_node, (0, filled))
        local_J = functional.pad(_index_inside(self.rank_Z)[here_Z], (0, filled))
        inside = Destinations(
            rank_E=rank_J.to(device, torch.int32),
            local_E=local_J.to(device, torch.int32),
            max_local=ranks.max_local,
            num_local=ranks.num_local,
            num_ranks=per_node,
        )
        return NodeDestinations(ranks, nodes, inside)


def _index_inside(bucket_Z: Tensor) -> Tensor:
    """int64 [Z]: how many of the same bucket come before each."""
    order_Z = bucket_Z.argsort(stable=True)
    count = torch.bincount(bucket_Z)
    start_Z = (count.cumsum(0) - count)[bucket_Z[order_Z]]
    return torch.empty_like(order_Z).scatter_(0, order_Z, torch.arange(len(order_Z)) - start_Z)
