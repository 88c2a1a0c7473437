"""The fused router in plain torch: the definition that tests and benchmarks hold the native operator to.

Shapes: T tokens, E experts (the null ones last), K experts per token, N = T * K pairs.
"""

from typing import Unpack

import torch
from torch import Tensor

from moetrain.ops.reference_select_experts import select_experts_reference
from moetrain.ops.route import Routed
from moetrain.ops.select_experts import SelectOptions


def route_reference(logits_TE: Tensor, top_k: int, **options: Unpack[SelectOptions]) -> Routed:
    """See ``moetrain.ops.route.route``; gradients come from torch's autograd."""
    chosen = select_experts_reference(logits_TE, top_k, **options)
    pair_N, offset_E1 = grouped(chosen.expert_id_TK.flatten(), logits_TE.shape[1] - options.get("num_null", 0))
    place_N = torch.empty_like(pair_N).scatter(0, pair_N, torch.arange(len(pair_N), device=pair_N.device))
    return Routed(
        token_N=(pair_N // top_k).int(),
        weight_N=chosen.weight_TK.flatten()[pair_N],
        offset_E1=offset_E1.int(),
        expert_id_TK=chosen.expert_id_TK,
        place_TK=place_N.view_as(chosen.expert_id_TK).int(),
        prob_sum_GE=chosen.prob_sum_GE,
        count_GE=chosen.count_GE,
        bad_1=chosen.bad_1,
    )


def grouped(expert_id_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Positions sorted stably by expert, -1 last, and the experts' offsets."""
    bucket_N = torch.where(expert_id_N < 0, num_experts, expert_id_N).long()
    count_E = torch.bincount(bucket_N, minlength=num_experts + 1)[:num_experts]
    return bucket_N.sort(stable=True).indices, torch.cat([count_E.new_zeros(1), count_E.cumsum(0)])
