"""The selection of experts in plain torch: the definition that tests and benchmarks hold the native operator to.

Whatever is normalised, weights and probabilities alike, is a softmax of the logarithms of scores: scores may then be
too small for their type, and their shares are right all the same.
Shapes: T tokens, E experts (the null ones last), K experts per token, G segments.
"""

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.config.moe import GroupRule
from moetrain.ops.select_experts import Score, Selection, SelectOptions, all_options


def select_experts_reference(logits_TE: Tensor, top_k: int, **options: Unpack[SelectOptions]) -> Selection:
    """See ``moetrain.ops.select_experts.select_experts``; gradients come from torch's autograd."""
    given = all_options(options)
    score, bias_E, valid_T, segment_T = given["score"], given["bias_E"], given["valid_T"], given["segment_T"]
    num_null, num_segments, group_rule = given["num_null"], given["num_segments"], given["group_rule"]
    num_experts = logits_TE.shape[1]
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    valid_T = torch.ones_like(logits_TE[:, 0], dtype=torch.bool) if valid_T is None else valid_T
    segment_T = torch.zeros_like(valid_T, dtype=torch.int64) if segment_T is None else segment_T.long()
    finite_T = logits_TE.isfinite().all(-1)
    counted_T = valid_T & finite_T
    logits_TE = torch.where(counted_T[:, None], logits_TE, 0.0)

    score_TE, log_score_TE = scores(logits_TE, score)
    prob_TE = log_score_TE.softmax(-1)
    biased_TE = score_TE if bias_E is None else score_TE + bias_E.to(score_TE.dtype)
    key_TE = (logits_TE if bias_E is None else biased_TE).detach()
    # Without a bias probabilities rank groups as scores do, and do not vanish.
    summed_TE = prob_TE if bias_E is None and score != "topk_softmax" else biased_TE
    worth_TE = key_TE if group_rule == "max" else summed_TE.detach()
    kept_TE = kept_groups(worth_TE, given["num_groups"], given["groups_kept"], group_rule)
    raw_id_TK = ordered_topk(key_TE.masked_fill(~kept_TE, -torch.inf), top_k)
    true_TK = (raw_id_TK < num_experts - num_null) & counted_T[:, None]
    weight_TK = weights(score_TE, log_score_TE, raw_id_TK, true_TK, score, given["renormalise"]) * given["scale"]

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
    """The score that selection adds the bias to, and its logarithm up to a constant of the token.

    "topk_softmax" ranks by logits and weighs by softmax: its second result belongs to the weights.
    """
    if score == "softmax":
        return logits_TE.softmax(-1), logits_TE
    if score == "topk_softmax":
        return logits_TE, logits_TE
    if score == "sigmoid":
        return logits_TE.sigmoid(), functional.logsigmoid(logits_TE)
    # log(softplus(x)) is x from where e^x / 2 is beyond the last digit of 1; no root or logarithm of 0 is ever taken.
    deep_TE = logits_TE < math.log(torch.finfo(logits_TE.dtype).eps)
    softplus_TE = torch.where(deep_TE, 1.0, logits_TE).logaddexp(torch.zeros_like(logits_TE))
    half_TE = torch.where(deep_TE, logits_TE, 0.0) / 2
    return torch.where(deep_TE, half_TE.exp(), softplus_TE.sqrt()), torch.where(deep_TE, half_TE, softplus_TE.log() / 2)


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
    score_TE: Tensor, log_score_TE: Tensor, raw_id_TK: Tensor, true_TK: Tensor, score: Score, renormalise: bool
) -> Tensor:
    """Weights of the chosen experts before the scale; 0 where the choice is not a true expert."""
    if score != "topk_softmax" and not renormalise:
        return torch.where(true_TK, score_TE.gather(1, raw_id_TK), 0.0)
    any_true_T1 = true_TK.any(-1, keepdim=True)
    masked_TK = torch.where(true_TK | ~any_true_T1, log_score_TE.gather(1, raw_id_TK), -torch.inf)
    return torch.where(true_TK, masked_TK.softmax(-1), 0.0)
