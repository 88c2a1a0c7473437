"""Dispatch in two hops: a token crosses to each node once, however many ranks of it hold its experts.

The first hop goes to the rank in the sender's own place on the other node, the second, inside the node, to the ranks
that hold the experts; combining sums in reverse. Between nodes a token costs at most one row per node instead of one
per rank, at the price of a second, faster, hop (the idea of node-limited all-to-alls, e.g. DeepSeek-V3, 2412.19437,
section 3.2).

Two nodes of two ranks with one expert each (expert r on rank r). Rank 0 has tokens A, for experts 2 and 3, and B, for
expert 3:

    node 0      node 1          hop between nodes   0 -> 2   rows A B     pairs A2 A3 B3
    0  1        2  3            hop inside node 1   2 -> 2   row  A       pair  A2
                                                    2 -> 3   rows A B     pairs A3 B3

In one hop A would have crossed twice. Everything about both hops is known after one exchange of counts, in which rank
0 sends:

    to        about rank w's own experts     about what rank w forwards
    rank 2    1 row, 1 pair                  2 rows: 1 on to rank 2, 2 on to rank 3; pairs: 1 of expert 2, 2 of expert 3
    rank 3    2 rows, 2 pairs                the same, and ignored: rank 3 is not in rank 0's place

Sums are rounded to the type of the rows on the node and again at the sender, once more than in one hop. Only the first
hop of a dispatch and the last one of a combine run beside computation.

Shapes: V nodes, L ranks of the group on each, W = V L; J seats of a node, e experts of a rank; Z = 2 + J and K
counters, H shards of an expert, I pieces of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.moe.dispatch.plan import (
    DispatchPlan,
    Hop,
    HostNumbers,
    PendingHop,
    Received,
    Split,
    bad_ranks_of,
    exchange_piece_counts,
    rows_and_pairs,
)
from moetrain.moe.dispatch.seats import NodeDestinations
from moetrain.moe.routing import PairList, Routing


@torch.no_grad()
def plan_two_level(
    routings: Sequence[Routing], to: NodeDestinations, bad_1: Tensor, groups: DispatchGroups
) -> list[DispatchPlan]:
    """Two hops, still one exchange of counts and one device-to-host copy for all pieces. See ``plan_direct``.

    Args:
        routings: of each piece, over destinations; the same number of pieces on all ranks.
        to: where experts are.
        bad_1: above 0 where this rank's router saw NaN or Inf; every rank of the group learns of it.
        groups: the ranks among which rows move; with ``between`` and ``inside``.
    """
    between, inside = groups.hop_between(), groups.hop_inside()
    sends = [to.nodes.plan_sends(routing.pairs, bad_1) for routing in routings]
    to_ranks = [to.ranks.plan_sends(routing.pairs, bad_1).counts_WK for routing in routings]
    messages = [
        _message(counts_WK, send.counts_WK, inside.size) for counts_WK, send in zip(to_ranks, sends, strict=True)
    ]
    recv_IHWK, bad_X = exchange_piece_counts(messages, groups)
    counts = [
        _Counts.read(recv_HWK, send.counts_WK, to, groups) for recv_HWK, send in zip(recv_IHWK, sends, strict=True)
    ]
    host = HostNumbers([numbers for one in counts for numbers in one.pack(to)] + [bad_X])
    # Read everything before the first collective: the copy is where the host waits.
    splits = [_Splits.read(host, between.size, inside.size, groups.etp_size) for _ in routings]
    bad_ranks = bad_ranks_of(host.take(len(bad_X)))
    firsts = [
        PendingHop.start(between, send, split.send_between, split.recv_between, routing.num_tokens)
        for routing, send, split in zip(routings, sends, splits, strict=True)
    ]
    seconds: list[tuple[Hop, PendingHop]] = []
    for first, one, split in zip(firsts, counts, splits, strict=True):
        row_P, hop = first.finish(first.metadata.wait(), one.recv_VZ, to.nodes.max_local)
        # What was received is forwarded as pairs over the node's experts whose tokens are the received rows.
        forwarded = PairList(row_P, hop.offset_E1, split.recv_between.num_rows)
        send, recv = to.inside.plan_sends(forwarded, bad_1), split.recv_inside[groups.etp_rank]
        seconds.append((hop, PendingHop.start(inside, send, split.send_inside, recv, forwarded.num_tokens)))
    return [
        second.finish_plan(Received(one.recv_HLK, split.recv_inside, bad_ranks), to.ranks.num_local, groups, (hop,))
        for (hop, second), one, split in zip(seconds, counts, splits, strict=True)
    ]


def _message(counts_WK: Tensor, to_nodes_VZ: Tensor, per_node: int) -> Tensor:
    """What rank w is sent: its own counts; then of its node the rows, each rank's share of them, and the pairs.

    Only the rank in the sender's own place on each node forwards; all get the message: equal sizes are simpler.
    """
    to_node_W = to_nodes_VZ.repeat_interleave(per_node, dim=0)
    shares_VL = counts_WK[:, 0].view(-1, per_node)
    return torch.cat((counts_WK, to_node_W[:, :1], shares_VL.repeat_interleave(per_node, dim=0), to_node_W[:, 2:]), 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Counts:
    """What one piece's exchange of counts says of this rank, on the device.

    Args:
        send_VZ: rows, flag and pairs per expert of the node that this rank sends to each node.
        recv_VZ: the same, of what each node's rank in this place sends here.
        forward_rows_VL: how many of these rows go on to each rank of this node.
        recv_HLK: rows, flag and pairs per local expert that rank l of etp rank h's node forwards to etp rank h.
    """

    send_VZ: Tensor
    recv_VZ: Tensor
    forward_rows_VL: Tensor
    recv_HLK: Tensor

    @staticmethod
    def read(recv_HWK: Tensor, send_VZ: Tensor, to: NodeDestinations, groups: DispatchGroups) -> "_Counts":
        """Take ``_message`` apart on the other side."""
        assert groups.inside is not None
        per_node, own = groups.inside.size(), 2 + to.ranks.max_local
        recv_HVLK = recv_HWK.unflatten(1, (-1, per_node))
        forward_VK = recv_HVLK[groups.etp_rank, :, groups.inside.rank(), own:]
        rows_V1, rows_VL, pairs_VJ = forward_VK.split((1, per_node, to.nodes.max_local), dim=1)
        recv_VZ = torch.cat((rows_V1, torch.zeros_like(rows_V1), pairs_VJ), dim=1)
        return _Counts(send_VZ, recv_VZ, rows_VL, recv_HVLK[..., :own].sum(1))

    def pack(self, to: NodeDestinations) -> list[Tensor]:
        """Rows and pairs of each split, in the order of ``_Splits``."""
        pairs_L = self.forward_rows_VL.new_zeros(self.forward_rows_VL.shape[1])
        pairs_L.index_add_(0, to.inside.rank_E.long(), self.recv_VZ[:, 2:].sum(0))
        forward_2L = torch.stack((self.forward_rows_VL.sum(0), pairs_L))
        received = [rows_and_pairs(counts_LK) for counts_LK in self.recv_HLK]
        return [rows_and_pairs(self.send_VZ), rows_and_pairs(self.recv_VZ), forward_2L, *received]


@dataclass(frozen=True, slots=True)
class _Splits:
    """Rows and pairs of one piece: of the hop between nodes, and of the one inside (received: by each etp rank)."""

    send_between: Split
    recv_between: Split
    send_inside: Split
    recv_inside: list[Split]

    @staticmethod
    def read(host: HostNumbers, num_nodes: int, per_node: int, num_shards: int) -> "_Splits":
        """In the order of ``_Counts.pack``."""
        send, recv, forward = host.split(num_nodes), host.split(num_nodes), host.split(per_node)
        return _Splits(send, recv, forward, [host.split(per_node) for _ in range(num_shards)])
