"""Dispatch in one hop: every row goes straight to the rank that has its expert.

Shapes: W ranks of the ep group, X ranks that counts are exchanged among, K counters for each, I pieces of a
micro-batch, H parts of experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.dispatch.destinations import Destinations, DispatchGroups
from moetrain.moe.dispatch.plan import DispatchPlan, HostNumbers, Step, rows_and_pairs, tell
from moetrain.moe.routing import Routing


@torch.no_grad()
def plan_direct(
    routings: Sequence[Routing], to: Destinations, bad_1: Tensor, groups: DispatchGroups, counter: TrafficCounter | None
) -> list[DispatchPlan]:
    """Every row to its rank in one hop: one exchange of counts and one device-to-host copy for all pieces together.

    Args:
        routings: of each piece, over global experts; the same number of pieces on all ranks.
        to: where experts are reached.
        bad_1: above 0 where this rank's router saw NaN or Inf; every rank of the group learns of it.
        groups: the ranks among which rows move.
        counter: counts "counts", and pair metadata as "pairs" and, between parts, "etp_pairs".
    """
    num_ranks, num_parts = groups.ep.size(), groups.num_parts
    sends = [to.sends(routing, bad_1, num_ranks) for routing in routings]
    told_IHWK, bad_X = tell([sent[3] for sent in sends], groups, counter)
    parts = [counts for sent, told_HWK in zip(sends, told_IHWK, strict=True) for counts in (sent[3], *told_HWK)]
    host = HostNumbers([rows_and_pairs(counts_WK) for counts_WK in parts] + [bad_X])
    # Read everything before the first collective: the copy is where the host waits.
    splits = [(host.split(num_ranks), [host.split(num_ranks) for _ in range(num_parts)]) for _ in routings]
    bad_ranks = tuple(rank for rank, flag in enumerate(host.take(len(bad_X))) if flag)
    steps = [
        Step.start(groups.ep, "", sent, away, reaching[groups.part], routing.num_tokens, counter)
        for routing, sent, (away, reaching) in zip(routings, sends, splits, strict=True)
    ]
    plans = []
    for step, told_HWK, (_, reaching) in zip(steps, told_IHWK, splits, strict=True):
        plans.append(step.last(told_HWK.flatten(0, 1), reaching, to.num_local, groups, bad_ranks, (), counter))
    return plans
