"""Dispatch in one hop: every row goes straight to the rank that has its expert. Shapes: as in ``dispatch.plan``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.moe.dispatch.destinations import Destinations
from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.moe.dispatch.plan import (
    DispatchPlan,
    HostNumbers,
    PendingHop,
    Received,
    bad_ranks_of,
    exchange_piece_counts,
    rows_and_pairs,
)
from moetrain.moe.routing import Routing


@torch.no_grad()
def plan_direct(
    routings: Sequence[Routing], to: Destinations, bad_1: Tensor, groups: DispatchGroups
) -> list[DispatchPlan]:
    """Every row to its rank in one hop: one exchange of counts and one device-to-host copy for all pieces together.

    Args:
        routings: of each piece, over destinations; the same number of pieces on all ranks.
        to: where these are.
        bad_1: above 0 where this rank's router saw NaN or Inf; every rank of the group learns of it.
        groups: the ranks among which rows move.
    """
    hop_group = groups.direct_hop()
    num_ranks, num_shards = hop_group.size, groups.etp_size
    sends = [to.plan_sends(routing.pairs, bad_1) for routing in routings]
    recv_IHWK, bad_X = exchange_piece_counts([send.counts_WK for send in sends], groups)
    counts = [one for send, recv_HWK in zip(sends, recv_IHWK, strict=True) for one in (send.counts_WK, *recv_HWK)]
    host = HostNumbers([*map(rows_and_pairs, counts), bad_X])
    # Read everything before the first collective: the copy is where the host waits.
    splits = [(host.split(num_ranks), [host.split(num_ranks) for _ in range(num_shards)]) for _ in routings]
    bad_ranks = bad_ranks_of(host.take(len(bad_X)))
    hops = [
        PendingHop.start(hop_group, send, send_split, recv_splits[groups.etp_rank], routing.num_tokens)
        for routing, send, (send_split, recv_splits) in zip(routings, sends, splits, strict=True)
    ]
    return [
        hop.finish_plan(Received(recv_HWK, recv_splits, bad_ranks), to.num_local, groups)
        for hop, recv_HWK, (_, recv_splits) in zip(hops, recv_IHWK, splits, strict=True)
    ]
