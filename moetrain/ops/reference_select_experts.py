"""The selection of experts in plain torch: the definition that tests and benchmarks hold the native operator to.

Shapes: T tokens, E experts (the null ones last), K experts per token, G segments.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.config.moe import GroupRule
from moetrain.ops.select_experts import Score, Selection

SUM_GUARD = 1e-20


def select_experts_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    num_null: int = 0,
    num_groups: int = 1,
    groups_kept: int = 1,
    group_rule: GroupRule = "top2_sum",
    renormalise: bool = True,
    scale: float = 1.0,
    valid_T: Tensor | None = None,
    segment_T: Tensor | None = None,
    num_segments: int = 1,
) -> Selection:
    """See ``moetrain.ops.select_experts.select_experts``; gradients come from torch's autograd."""
    num_experts = logits_TE.shape[1]
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool) if valid_T is None else valid_T
    segment_T = torch.zeros_like(valid_T, dtype=torch.int64) if segment_T is None else segment_T.long()
    finite_T = logits_TE.isfinite().all(-1)
    counted_T = valid_T & finite_T
    logits_TE = torch.where(counted_T[:, None], logits_TE, 0.0)

    score_TE, prob_TE = scores(logits_TE, score)
    biased_TE = score_TE if bias_E is None else score_TE + bias_E.to(score_TE.dtype)
    key_TE = (logits_TE if bias_E is None else biased_TE).detach()
    worth_TE = key_TE if group_rule == "max" else biased_TE.detach()
    kept_TE = kept_groups(worth_TE, num_groups, groups_kept, group_rule)
    raw_id_TK = ordered_topk(key_TE.masked_fill(~kept_TE, -torch.inf), top_k)
    true_TK = (raw_id_TK < num_experts - num_null) & counted_T[:, None]
    weight_TK = weights(logits_TE, score_TE, raw_id_TK, true_TK, score, renormalise) * scale

    member_TG = functional.one_hot(torch.where(counted_T, segment_T, 0), num_segments) * counted_T[:, None]
    chosen_TE = functional.one_hot(raw_id_TK, num_experts).sum(1)
    return Selection(
        expert_id_TK=torch.where(true_TK, raw_id_TK, -1).int(),
        weight_TK=weight_TK,
        prob_sum_GE=member_TG.to(prob_TE.dtype).T @ prob_TE,
        count_GE=member_TG.T @ chosen_TE,
        bad_1=(valid_T & ~finite_T).any().int().reshape(1),
    )


def scores(logits_TE: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """The score that selection adds the bias to, and the probability that the balance statistics sum."""
    if score == "softmax":
        prob_TE = logits_TE.softmax(-1)
        return prob_TE, prob_TE
    if score == "topk_softmax":
        return logits_TE, logits_TE.softmax(-1)
    score_TE = logits_TE.sigmoid() if score == "sigmoid" else functional.softplus(logits_TE, threshold=100.0).sqrt()
    return score_TE, score_TE / (score_TE.sum(-1, keepdim=True) + SUM_GUARD)


def kept_groups(worth_TE: Tensor, num_groups: int, groups_kept: int, group_rule: GroupRule) -> Tensor:
    """Which experts are in one of the ``groups_kept`` best groups."""
    num_tokens, num_experts = worth_TE.shape
    size = num_experts // num_groups
    worth_TGS = worth_TE.view(num_tokens, num_groups, size)
    best = 1 if group_rule == "max" else min(2, size)
    group_TG = ordered_topk(worth_TGS.topk(best, -1).values.sum(-1), groups_kept)
    kept_TG = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=worth_TE.device).scatter(1, group_TG, True)
    return kept_TG.repeat_interleave(size, 1)


def ordered_topk(value_TE: Tensor, top_k: int) -> Tensor:
    """Indices of the ``top_k`` largest, ties to the lower index (``torch.topk`` promises nothing on ties)."""
    return value_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def weights(
    logits_TE: Tensor, score_TE: Tensor, raw_id_TK: Tensor, true_TK: Tensor, score: Score, renormalise: bool
) -> Tensor:
    """Weights of the chosen experts before the scale; 0 where the choice is not a true expert."""
    if score == "topk_softmax" or (score == "softmax" and renormalise):
        logit_TK = logits_TE.gather(1, raw_id_TK)
        any_true_T1 = true_TK.any(-1, keepdim=True)
        masked_TK = torch.where(true_TK | ~any_true_T1, logit_TK, -torch.inf)
        return torch.where(true_TK, masked_TK.softmax(-1), 0.0)
    weight_TK = torch.where(true_TK, score_TE.gather(1, raw_id_TK), 0.0)
    if renormalise:
        return weight_TK / (weight_TK.sum(-1, keepdim=True) + SUM_GUARD)
    return weight_TK
