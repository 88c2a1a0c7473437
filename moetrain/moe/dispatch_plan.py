"""Who sends which rows to whom, for one layer and micro-batch: indices and splits, no floating-point data.

Shapes: T tokens, E experts, e experts held here, N pairs (capacity), P pairs sent or received, W ranks of the group,
R rows sent or received.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.mesh.collectives import TrafficCounter, all_to_all_rows, exchange_counts
from moetrain.moe.routing import Routing
from moetrain.ops import group_pairs


@dataclass(frozen=True, slots=True, eq=False)
class Destinations:
    """Where each expert is reached, fixed by the Placement.

    Args:
        rank_E: int64, index in the dispatch group of the rank to which this rank sends expert e's tokens.
        local_E: int64, index of e among the experts held by that rank.
        rank_of_pair_E1: int32, ``rank_E`` and a final -1, which stands for the list's tail.
        max_local: most experts that any rank of the group holds.
        num_local: experts held here.
    """

    rank_E: Tensor
    local_E: Tensor
    rank_of_pair_E1: Tensor
    max_local: int
    num_local: int

    @staticmethod
    def of(ranks_E: list[int], held: list[tuple[int, ...]], group_rank: int, device: torch.device) -> "Destinations":
        """From the destination of each expert and the experts each rank of the group holds, ascending."""
        rank_E = torch.tensor(ranks_E, dtype=torch.int64, device=device)
        local_E = torch.tensor([held[rank].index(e) for e, rank in enumerate(ranks_E)], dtype=torch.int64)
        return Destinations(
            rank_E=rank_E,
            local_E=local_E.to(device),
            rank_of_pair_E1=torch.cat((rank_E, rank_E.new_tensor([-1]))).int(),
            max_local=max(map(len, held)),
            num_local=len(held[group_rank]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class DispatchPlan:
    """Splits on the host, indices on the device.

    Args:
        send_rows, recv_rows: rows to and from each rank of the group.
        send_pairs, recv_pairs: pairs to and from each rank of the group.
        send_token_R: int32, the token of each sent row; destinations ascending, tokens ascending inside one.
        send_pair_P: int32, the pair (index into the Routing) behind each sent weight.
        recv_pair_P: int32, puts received weights into the order of ``row_P``.
        row_P: int32, the received row of each pair, grouped by local expert; sources ascend inside an expert.
        offset_e1: int32, where each local expert's pairs begin.
        bad_ranks: ranks of the group whose router saw NaN or Inf.
    """

    send_rows: list[int]
    recv_rows: list[int]
    send_pairs: list[int]
    recv_pairs: list[int]
    send_token_R: Tensor
    send_pair_P: Tensor
    recv_pair_P: Tensor
    row_P: Tensor
    offset_e1: Tensor
    bad_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Outgoing:
    """This rank's side of the plan, before lengths are known on the host."""

    hit_X: Tensor  # int64 [W * T], 1 where a token goes to a rank
    position_X: Tensor  # int64 [W * T], row of that (rank, token) in the send buffer
    pair_N: Tensor  # int32, pairs grouped by destination, experts ascending inside one
    row_N: Tensor  # int32, each such pair's row inside the destination's block
    counts_WC: Tensor  # int64 [W, 2 + max_local]: rows, bad flag, pairs per expert of the destination


@torch.no_grad()
def plan_dispatch(
    routing: Routing, to: Destinations, bad_1: Tensor, group: ProcessGroup, counter: TrafficCounter | None
) -> DispatchPlan:
    """Exchange counts and pair metadata: two small collectives and one device-to-host copy.

    Args:
        routing: over global experts.
        to: where experts are reached.
        bad_1: above 0 where this rank's router saw NaN or Inf; every rank of the group learns of it.
        group: the ranks among which rows move.
        counter: counts pair metadata as "pairs".
    """
    world = group.size()
    out = _outgoing(routing, to, bad_1, world)
    recv_WC = exchange_counts(out.counts_WC, group)
    recv_We = recv_WC[:, 2 : 2 + to.num_local]
    host = torch.stack((out.counts_WC[:, 0], out.counts_WC[:, 2:].sum(1), recv_WC[:, 0], recv_We.sum(1), recv_WC[:, 1]))
    send_rows, send_pairs, recv_rows, recv_pairs, bad = host.tolist()

    num_tokens, num_rows = routing.num_tokens, sum(send_rows)
    slot_X = torch.where(out.hit_X > 0, out.position_X, num_rows)  # the last slot takes what is not sent
    token_X = torch.arange(num_tokens, device=slot_X.device, dtype=torch.int32).repeat(world)
    send_token_R = token_X.new_empty(num_rows + 1).scatter_(0, slot_X, token_X)[:num_rows]

    sent_row_P1 = out.row_N[: sum(send_pairs), None].contiguous()
    moved_P1 = all_to_all_rows(sent_row_P1, send_pairs, recv_pairs, group, counter=counter, purpose="pairs")
    recv_pair_P, row_P, offset_e1 = _incoming(moved_P1.squeeze(1), recv_WC[:, 0], recv_We)
    return DispatchPlan(
        send_rows=send_rows,
        recv_rows=recv_rows,
        send_pairs=send_pairs,
        recv_pairs=recv_pairs,
        send_token_R=send_token_R,
        send_pair_P=out.pair_N[: sum(send_pairs)],
        recv_pair_P=recv_pair_P,
        row_P=row_P,
        offset_e1=offset_e1,
        bad_ranks=tuple(rank for rank, flag in enumerate(bad) if flag),
    )


def _outgoing(routing: Routing, to: Destinations, bad_1: Tensor, world: int) -> _Outgoing:
    """A token is hit once per destination, however many of that rank's experts it chose."""
    num_tokens, offset_E1 = routing.num_tokens, routing.offset_E1
    index_N = torch.arange(routing.capacity, device=offset_E1.device, dtype=torch.int32)
    expert_N = torch.searchsorted(offset_E1[1:].contiguous(), index_N, right=True)  # E in the tail
    rank_N = to.rank_of_pair_E1[expert_N]
    cell_N = torch.where(rank_N >= 0, rank_N.long() * num_tokens + routing.token_N, world * num_tokens)

    hit_X1 = torch.zeros(world * num_tokens + 1, dtype=torch.int64, device=offset_E1.device).scatter_(0, cell_N, 1)
    hit_X = hit_X1[:-1]
    position_X = hit_X.cumsum(0) - 1
    rows_W = hit_X.view(world, num_tokens).sum(1)
    start_W1 = torch.cat((rows_W.new_zeros(1), rows_W.cumsum(0)))  # the tail, rank -1, reads the last entry

    count_E = offset_E1.diff().long()
    counts_WC = torch.zeros(world, 2 + to.max_local, dtype=torch.int64, device=offset_E1.device)
    counts_WC[:, 0] = rows_W
    counts_WC[:, 1] = bad_1.sum()
    counts_WC[to.rank_E, 2 + to.local_E] = count_E

    pair_N, _ = group_pairs(rank_N, world)
    row_N = torch.cat((position_X, position_X.new_zeros(1)))[cell_N] - start_W1[rank_N.long()]
    return _Outgoing(hit_X, position_X, pair_N, row_N.index_select(0, pair_N).int(), counts_WC)


def _incoming(recv_row_P: Tensor, rows_W: Tensor, pairs_We: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regroup received pairs, which lie by (source, local expert), by (local expert, source)."""
    world, num_local = pairs_We.shape
    cell_X = torch.arange(world * num_local, dtype=torch.int32, device=recv_row_P.device)
    cell_P = torch.repeat_interleave(cell_X, pairs_We.reshape(-1), output_size=recv_row_P.shape[0])
    source_P = torch.div(cell_P, max(1, num_local), rounding_mode="floor")
    start_W = (rows_W.cumsum(0) - rows_W).int()
    pair_P, offset_e1 = group_pairs(cell_P - source_P * num_local, num_local)
    return pair_P, (recv_row_P + start_W[source_P]).index_select(0, pair_P), offset_e1
