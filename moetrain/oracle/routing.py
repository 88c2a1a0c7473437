"""Token-choice routing and its balance losses, as their definitions read.

Shapes: T tokens, E experts, K experts per token, G groups of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import MoEConfig


@dataclass(frozen=True, slots=True)
class Choice:
    """What one micro-batch chose in one layer."""

    weight_TE: Tensor  # weight of every expert for every token, 0 where it was not chosen
    prob_sum_E: Tensor  # sum over tokens of the router's probability of each expert
    count_E: Tensor  # int64, tokens that chose each expert
    gap: float  # least difference between a score that won and one that lost; inf where nothing could lose
    chosen_TE: Tensor  # bool


def choose(logit_TE: Tensor, moe: MoEConfig, bias_E: Tensor) -> Choice:
    """Choose ``top_k`` experts per token by biased score and weigh them by the unbiased one.

    The order is total, (score descending, expert id ascending); selection carries no gradient, the weights do.
    """
    score_TE, prob_TE = _scores(logit_TE, moe)
    chosen_TE, gap = select((score_TE + bias_E).detach(), moe)
    if moe.score == "topk_softmax":
        weight_TE = logit_TE.masked_fill(~chosen_TE, -torch.inf).softmax(dim=-1)
    else:
        weight_TE = torch.where(chosen_TE, score_TE, 0.0)
        if moe.renormalise:
            tiny = 1e-20 if moe.score == "sigmoid" else 0.0
            weight_TE = weight_TE / (weight_TE.sum(dim=-1, keepdim=True) + tiny)
    return Choice(weight_TE * moe.weight_scale, prob_TE.sum(dim=0), chosen_TE.sum(dim=0), gap, chosen_TE)


def _scores(logit_TE: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Scores that selection compares, and probabilities (rows sum to 1) that the balance loss uses."""
    if moe.score == "sigmoid":
        score_TE = logit_TE.sigmoid()
        return score_TE, score_TE / (score_TE.sum(dim=-1, keepdim=True) + 1e-20)
    prob_TE = logit_TE.softmax(dim=-1)
    return (logit_TE if moe.score == "topk_softmax" else prob_TE), prob_TE


def select(score_TE: Tensor, moe: MoEConfig) -> tuple[Tensor, float]:
    """Mark each token's chosen experts, and say how narrow the narrowest decision was.

    Returns:
        A boolean [T, E] with ``top_k`` trues in each row, and the least gap over all tokens.
    """
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    group_size = moe.num_experts // moe.num_groups
    gaps = [float("inf")]
    for token, score_E in enumerate(score_TE.tolist()):
        groups = [list(range(g * group_size, (g + 1) * group_size)) for g in range(moe.num_groups)]
        group_scores = [_group_score([score_E[e] for e in group], moe.group_rule) for group in groups]
        kept, group_gap = _best(group_scores, list(range(moe.num_groups)), moe.groups_kept)
        candidates = [e for g in sorted(kept) for e in groups[g]]
        chosen, expert_gap = _best([score_E[e] for e in candidates], candidates, moe.top_k)
        chosen_TE[token, chosen] = True
        gaps += [group_gap, expert_gap]
    return chosen_TE, min(gaps)


def _group_score(scores: list[float], rule: str) -> float:
    return max(scores) if rule == "max" else sum(sorted(scores, reverse=True)[:2])


def _best(scores: list[float], ids: list[int], count: int) -> tuple[list[int], float]:
    """The ``count`` ids of highest score, lower ids first where scores tie, and their lead over the best loser."""
    ranking = sorted(zip(scores, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    gap = ranking[count - 1][0] - ranking[count][0] if count < len(ranking) else float("inf")
    return [expert for _, expert in ranking[:count]], gap


def auxiliary_loss(
    logit_TE: Tensor, choice: Choice, moe: MoEConfig, lagged_count_E: Tensor, num_step_tokens: int
) -> Tensor:
    """Balance loss and z-loss of one micro-batch in one layer (arXiv 2501.11873; ST-MoE for the z-loss).

    balance_coef * E * sum_i f_i P_i + z_loss_coef * mean logsumexp^2, where P_i and the mean run over all tokens of
    the optimizer step: each micro-batch adds its own sums divided by ``num_step_tokens``. The share f is a constant:
    of the previous step's counts over all ranks (``lagged``; 1 / E where there are none), or of this micro-batch's
    own counts (``micro``). Perfect balance gives 1 * balance_coef.
    """
    z_loss = moe.z_loss_coef * logit_TE.logsumexp(dim=-1).square().sum()
    if moe.balance_scope == "none":
        return z_loss / num_step_tokens
    count_E = (choice.count_E if moe.balance_scope == "micro" else lagged_count_E).to(logit_TE.dtype)
    total = count_E.sum()
    share_E = count_E / total if total > 0 else torch.full_like(count_E, 1 / moe.num_experts)
    balance = moe.balance_coef * moe.num_experts * (share_E * choice.prob_sum_E).sum()
    return (balance + z_loss) / num_step_tokens


def moved_bias(bias_E: Tensor, count_E: Tensor, moe: MoEConfig) -> Tensor:
    """The selection bias after an optimizer step: b + u * sign(mean(c) - c) (Wang et al., 2408.15664)."""
    if not moe.loss_free:
        return bias_E
    return bias_E + moe.bias_rate * torch.sign(count_E.sum() - count_E * len(count_E)).to(bias_E.dtype)
