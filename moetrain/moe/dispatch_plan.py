"""Who sends which rows to whom, for one layer and micro-batch: indices and splits, no floating-point data.

Shapes: E experts, e experts held here, P pairs sent or received, W ranks of the group, R rows sent or received.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.mesh.collectives import TrafficCounter, all_to_all_rows, exchange_counts, gather_rows_of_all
from moetrain.moe.routing import Routing
from moetrain.ops import plan_receives, plan_sends


@dataclass(frozen=True, slots=True, eq=False)
class Destinations:
    """Where each expert is reached, fixed by the Placement.

    Args:
        rank_E: int32, index in the dispatch group of the rank to which this rank sends expert e's tokens.
        local_E: int32, index of e among the experts held by that rank.
        max_local: most experts that any rank of the group holds.
        num_local: experts held here.
    """

    rank_E: Tensor
    local_E: Tensor
    max_local: int
    num_local: int

    @staticmethod
    def of(ranks_E: list[int], held: list[tuple[int, ...]], group_rank: int, device: torch.device) -> "Destinations":
        """From the destination of each expert and the experts each rank of the group holds, ascending."""
        local_E = [held[rank].index(e) for e, rank in enumerate(ranks_E)]
        return Destinations(
            rank_E=torch.tensor(ranks_E, dtype=torch.int32, device=device),
            local_E=torch.tensor(local_E, dtype=torch.int32, device=device),
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
        bad_ranks: ranks whose router saw NaN or Inf, by their index in the group that counts were exchanged in.
        part_rows, part_pairs: rows and pairs that reach each rank of the etp group over ep; all of them have all.
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
    part_rows: list[int]
    part_pairs: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class DispatchGroups:
    """The ranks among which rows move.

    Args:
        ep: rows travel to the rank of this group that has the expert.
        parts: the etp group, whose ranks have parts of the same experts and share the rows that reach one of them;
            None where experts are whole.
        counts: both, etp innermost; the same as ``ep`` where experts are whole.
    """

    ep: ProcessGroup
    parts: ProcessGroup | None
    counts: ProcessGroup

    @property
    def num_parts(self) -> int:
        """Ranks of ``parts``."""
        return 1 if self.parts is None else self.parts.size()


@torch.no_grad()
def plan_dispatch(
    routing: Routing, to: Destinations, bad_1: Tensor, groups: DispatchGroups, counter: TrafficCounter | None
) -> DispatchPlan:
    """Exchange counts and pair metadata: two small collectives (three with etp) and one device-to-host copy.

    Args:
        routing: over global experts.
        to: where experts are reached.
        bad_1: above 0 where this rank's router saw NaN or Inf; every rank of the group learns of it.
        groups: the ranks among which rows move.
        counter: counts pair metadata as "pairs" and, between parts, "etp_pairs".
    """
    token_C, pair_N, row_N, sent_WK = plan_sends(
        routing.token_N,
        routing.offset_E1,
        to.rank_E,
        to.local_E,
        bad_1,
        num_tokens=routing.num_tokens,
        num_ranks=groups.ep.size(),
        max_local=to.max_local,
    )
    # What reaches any part of an expert reaches all of them, so each is told of all: [ep, etp] -> [etp, ep].
    num_ranks, num_parts = groups.ep.size(), groups.num_parts
    told_XK = exchange_counts(sent_WK.repeat_interleave(num_parts, dim=0), groups.counts)
    told_PWK = told_XK.unflatten(0, (num_ranks, num_parts)).transpose(0, 1)
    host = torch.cat((_rows_and_pairs(sent_WK), _rows_and_pairs(told_PWK.flatten(0, 1)), told_XK[:, 1])).tolist()
    send_rows, send_pairs = host[:num_ranks], host[num_ranks : 2 * num_ranks]
    rest, size = host[2 * num_ranks :], num_ranks * num_parts
    rows_of_part, pairs_of_part = (
        [rest[start + part * num_ranks : start + (part + 1) * num_ranks] for part in range(num_parts)]
        for start in (0, size)
    )
    here = 0 if groups.parts is None else groups.parts.rank()
    recv_rows, recv_pairs = rows_of_part[here], pairs_of_part[here]
    part_rows, part_pairs = [sum(rows) for rows in rows_of_part], [sum(pairs) for pairs in pairs_of_part]
    num_sent = sum(send_pairs)
    moved_P1 = all_to_all_rows(
        row_N[:num_sent, None], send_pairs, recv_pairs, groups.ep, counter=counter, purpose="pairs"
    )
    if groups.parts is not None:
        moved_P1 = gather_rows_of_all(moved_P1, part_pairs, groups.parts, counter=counter, purpose="etp_pairs")
    recv_pair_P, row_P, offset_e1 = plan_receives(moved_P1.squeeze(1), told_PWK.flatten(0, 1), to.num_local)
    return DispatchPlan(
        send_rows=send_rows,
        recv_rows=recv_rows,
        send_pairs=send_pairs,
        recv_pairs=recv_pairs,
        send_token_R=token_C[: sum(send_rows)],
        send_pair_P=pair_N[:num_sent],
        recv_pair_P=recv_pair_P,
        row_P=row_P,
        offset_e1=offset_e1,
        bad_ranks=tuple(rank for rank, flag in enumerate(rest[2 * size :]) if flag),
        part_rows=part_rows,
        part_pairs=part_pairs,
    )


def _rows_and_pairs(counts_WK: Tensor) -> Tensor:
    """[2 W]: rows of each rank, then pairs of each."""
    return torch.cat((counts_WK[:, 0], counts_WK[:, 2:].sum(1)))
