"""Dispatch in two hops: a token crosses to each node once, however many ranks of it hold its experts.

The first hop goes to the rank in the sender's own place on the other node, the second, inside the node, to the ranks
that hold the experts; results are summed on the way home in reverse. Between nodes a token costs at most one row per
node instead of one per rank, at the price of a second, faster, hop (the idea of node-limited all-to-alls, e.g.
DeepSeek-V3, 2412.19437, section 3.2).

Everything about both hops is known after one exchange of counts: a rank tells each destination what its experts get,
as in one hop, and tells the rank that will forward its rows what these are to become.

Sums are rounded to the type of the rows on the node and again at home, once more than in one hop. Only the first hop
out and the last one home run beside computation.

Shapes: V nodes, L ranks of the group on each, W = V L; J experts of a node, e of a rank; Z = 2 + J and K counters, H
parts of experts, I pieces of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import NotBuiltYetError
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.dispatch.destinations import Destinations, DispatchGroups, destinations_in
from moetrain.moe.dispatch.plan import DispatchPlan, Hop, HostNumbers, Split, Step, rows_and_pairs, tell
from moetrain.moe.routing import Routing
from moetrain.placement.placement import Placement


@dataclass(frozen=True, slots=True, eq=False)
class NodeDestinations:
    """Where experts are reached, seen three ways.

    Args:
        ranks: over the ep group, all experts.
        nodes: over its nodes, all experts; ``max_local`` is J.
        inside: over the ranks of this node, the J experts of this node (fewer ones are filled up, and never chosen).
    """

    ranks: Destinations
    nodes: Destinations
    inside: Destinations

    @staticmethod
    def of(
        placement: Placement, pool_ranks: Sequence[int], group_rank: int, per_node: int, device: torch.device
    ) -> "NodeDestinations":
        """From the pool ranks of an ep group of which ``per_node`` at a time share a node.

        Raises:
            NotBuiltYetError: if ranks of the group reach an expert on different ranks of it.
        """
        reached = [destinations_in(placement, pool_ranks, here) for here in pool_ranks]
        if any(one != reached[0] for one in reached):
            raise NotBuiltYetError(
                "mesh.two_level", True, "with replicas of an expert inside an ep group; leave mesh.two_level out"
            )
        held = [placement.experts_of(rank) for rank in pool_ranks]
        ranks_E = reached[0]
        num_nodes = len(pool_ranks) // per_node
        at_node = [[e for e, rank in enumerate(ranks_E) if rank // per_node == node] for node in range(num_nodes)]
        node = group_rank // per_node
        nodes = Destinations.of([rank // per_node for rank in ranks_E], at_node, node, device)
        filled = at_node[node] + [-1] * (nodes.max_local - len(at_node[node]))
        rank_J = [0 if e < 0 else ranks_E[e] % per_node for e in filled]
        local_J = [0 if e < 0 else held[ranks_E[e]].index(e) for e in filled]
        ranks = Destinations.of(ranks_E, held, group_rank, device)
        inside = Destinations(
            rank_E=torch.tensor(rank_J, dtype=torch.int32, device=device),
            local_E=torch.tensor(local_J, dtype=torch.int32, device=device),
            max_local=ranks.max_local,
            num_local=ranks.num_local,
        )
        return NodeDestinations(ranks, nodes, inside)


@dataclass(frozen=True, slots=True, eq=False)
class _Told:
    """What one piece's exchange of counts says of this rank, on the device.

    Args:
        away_VZ: rows, flag and pairs per expert of the node that this rank sends to each node.
        coming_VZ: the same, of what each node's rank in this place sends here.
        rows_VL: how many of these rows go on to each rank of this node.
        inside_HLK: rows, flag and pairs per local expert that rank l of part h's node forwards to part h.
    """

    away_VZ: Tensor
    coming_VZ: Tensor
    rows_VL: Tensor
    inside_HLK: Tensor


@torch.no_grad()
def plan_two_level(
    routings: Sequence[Routing],
    to: NodeDestinations,
    bad_1: Tensor,
    groups: DispatchGroups,
    counter: TrafficCounter | None,
) -> list[DispatchPlan]:
    """Two hops, still one exchange of counts and one device-to-host copy for all pieces. See ``plan_direct``.

    Args:
        routings: of each piece, over global experts; the same number of pieces on all ranks.
        to: where experts are reached.
        bad_1: above 0 where this rank's router saw NaN or Inf; every rank of the group learns of it.
        groups: the ranks among which rows move; with ``between`` and ``inside``.
        counter: counts "counts", and pair metadata as "pairs" (first hop), "pairs_inside" and, between parts,
            "etp_pairs".
    """
    between, inside = groups.between, groups.inside
    assert between is not None
    assert inside is not None
    num_nodes, per_node, num_parts = between.size(), inside.size(), groups.num_parts
    sends = [to.nodes.sends(routing, bad_1, num_nodes) for routing in routings]
    told = [to.ranks.sends(routing, bad_1, groups.ep.size())[3] for routing in routings]
    messages = [_message(counts_WK, sent[3], per_node) for counts_WK, sent in zip(told, sends, strict=True)]
    told_IHWK, bad_X = tell(messages, groups, counter)
    seen = [_read(told_HWK, sent[3], to, groups) for told_HWK, sent in zip(told_IHWK, sends, strict=True)]
    host = HostNumbers([part for one in seen for part in _splits(one, to)] + [bad_X])
    # Read everything before the first collective: the copy is where the host waits.
    splits = [_Splits.read(host, num_nodes, per_node, num_parts) for _ in routings]
    bad_ranks = tuple(rank for rank, flag in enumerate(host.take(len(bad_X))) if flag)
    steps = [
        Step.start(between, "", sent, split.away, split.coming, routing.num_tokens, counter)
        for routing, sent, split in zip(routings, sends, splits, strict=True)
    ]
    # What came is forwarded as a routing over the node's experts whose tokens are the rows that came.
    seconds: list[tuple[Hop, Step]] = []
    for routing, step, one, split in zip(routings, steps, seen, splits, strict=True):
        row_P, hop = step.finish(step.metadata.wait(), one.coming_VZ, to.nodes.max_local)
        arrived = Routing(row_P, row_P, hop.offset_E1, routing.token_gid_T2, sum(split.coming.rows))
        sent = to.inside.sends(arrived, bad_1, per_node)
        here = split.reaching[groups.part]
        second = Step.start(inside, "_inside", sent, split.on, here, arrived.num_tokens, counter)
        seconds.append((hop, second))
    return [
        second.last(
            one.inside_HLK.flatten(0, 1), split.reaching, to.ranks.num_local, groups, bad_ranks, (hop,), counter
        )
        for (hop, second), one, split in zip(seconds, seen, splits, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Splits:
    """Rows and pairs of one piece: sent between nodes, received there, sent inside, received there by each part."""

    away: Split
    coming: Split
    on: Split
    reaching: list[Split]

    @staticmethod
    def read(host: HostNumbers, num_nodes: int, per_node: int, num_parts: int) -> "_Splits":
        """In the order of ``_splits``."""
        away, coming, on = host.split(num_nodes), host.split(num_nodes), host.split(per_node)
        return _Splits(away, coming, on, [host.split(per_node) for _ in range(num_parts)])


def _message(counts_WK: Tensor, away_VZ: Tensor, per_node: int) -> Tensor:
    """What rank w is told: its own counts, then of its node the rows sent, each rank's share of them, and the pairs.

    Only the rank in the sender's own place on each node forwards; all are told: messages of one size are simpler.
    """
    to_node_W = away_VZ.repeat_interleave(per_node, dim=0)
    shares_VL = counts_WK[:, 0].view(-1, per_node)
    return torch.cat((counts_WK, to_node_W[:, :1], shares_VL.repeat_interleave(per_node, dim=0), to_node_W[:, 2:]), 1)


def _read(told_HWK: Tensor, away_VZ: Tensor, to: NodeDestinations, groups: DispatchGroups) -> _Told:
    """Take ``_message`` apart on the other side."""
    assert groups.inside is not None
    per_node, own = groups.inside.size(), 2 + to.ranks.max_local
    told_HVLK = told_HWK.unflatten(1, (-1, per_node))
    forward_VK = told_HVLK[groups.part, :, groups.inside.rank(), own:]
    rows_V1, rows_VL, pairs_VJ = forward_VK.split((1, per_node, to.nodes.max_local), dim=1)
    coming_VZ = torch.cat((rows_V1, torch.zeros_like(rows_V1), pairs_VJ), dim=1)
    return _Told(away_VZ, coming_VZ, rows_VL, told_HVLK[..., :own].sum(1))


def _splits(told: _Told, to: NodeDestinations) -> list[Tensor]:
    """Rows and pairs of each split: sent between, received between, sent inside, received inside (of each part)."""
    pairs_L = told.rows_VL.new_zeros(told.rows_VL.shape[1])
    pairs_L.index_add_(0, to.inside.rank_E.long(), told.coming_VZ[:, 2:].sum(0))
    on_2L = torch.stack((told.rows_VL.sum(0), pairs_L))
    received = [rows_and_pairs(counts_LK) for counts_LK in told.inside_HLK]
    return [rows_and_pairs(told.away_VZ), rows_and_pairs(told.coming_VZ), on_2L, *received]
