"""Token-choice routing and its balance losses, as their definitions read.

Shapes: T tokens, E experts, K experts per token, G groups of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import BalanceConfig, MoELayerConfig

STEEPEST = 1 / 4  # slope of a sigmoid: times it, a gap of logits is never less than that of two sigmoids


@dataclass(frozen=True, slots=True)
class Choice:
    """What one micro-batch chose in one layer."""

    weight_TE: Tensor  # weight of every expert for every token, 0 where it was not chosen
    prob_sum_E: Tensor  # sum over tokens of the router's probability of each expert
    count_E: Tensor  # int64, tokens that chose each expert
    gap: float  # least difference between a score that won and one that lost; inf where nothing could lose
    chosen_TE: Tensor  # bool


def choose(logit_TE: Tensor, config: MoELayerConfig, bias_E: Tensor) -> Choice:
    """Choose ``top_k`` experts per token by biased score and weigh them by the unbiased one.

    The order is total, (score descending, expert id ascending); selection carries no gradient, the weights do. Scores
    without a bias order as logits do, also where they are too near to 0 or to 1 for their type.
    """
    by_logit = config.router.score == "topk_softmax"
    score_TE = logit_TE if by_logit else scores_of(logit_TE, config)
    log_score_TE = log_scores_of(logit_TE, config)
    key_TE = worth_TE = (score_TE + bias_E).detach()
    if not (by_logit or config.balance.loss_free or bias_E.any()):
        key_TE, worth_TE = logit_TE.detach() * STEEPEST, shares(log_score_TE).detach()
    chosen_TE, gap = select(key_TE, config, worth_TE)
    if config.router.renormalise or config.router.score == "topk_softmax":
        weight_TE = shares(log_score_TE.masked_fill(~chosen_TE, -torch.inf))
    else:
        weight_TE = torch.where(chosen_TE, score_TE, 0.0)
    prob_TE = shares(log_score_TE)
    return Choice(weight_TE * config.router.weight_scale, prob_TE.sum(dim=0), chosen_TE.sum(dim=0), gap, chosen_TE)


def scores_of(logit_TE: Tensor, config: MoELayerConfig) -> Tensor:
    """1 / (1 + e^-x), or the softmax over all experts."""
    return logit_TE.sigmoid() if config.router.score == "sigmoid" else logit_TE.softmax(dim=-1)


def log_scores_of(logit_TE: Tensor, config: MoELayerConfig) -> Tensor:
    """Logarithms of the scores, which stay where scores are too small for their type."""
    if config.router.score == "sigmoid":
        return -torch.logaddexp(-logit_TE, torch.zeros_like(logit_TE))
    return logit_TE.log_softmax(dim=-1)


def shares(log_TE: Tensor) -> Tensor:
    """Each number's share of its row's sum, from their logarithms."""
    return log_TE.log_softmax(dim=-1).exp()


def select(score_TE: Tensor, config: MoELayerConfig, worth_TE: Tensor | None = None) -> tuple[Tensor, float]:
    """Mark each token's chosen experts, and say how narrow the narrowest decision was.

    Args:
        score_TE: What ranks experts, and groups by their best.
        config: How many, of which groups.
        worth_TE: What ranks groups by a sum; ``score_TE`` where left out.

    Returns:
        A boolean [T, E] with ``top_k`` trues in each row, and the least gap over all tokens.
    """
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    group_size = config.moe.num_experts // config.router.num_groups
    gaps = [float("inf")]
    groups = [list(range(g * group_size, (g + 1) * group_size)) for g in range(config.router.num_groups)]
    by_sum_TE = score_TE if worth_TE is None or config.router.group_rule == "max" else worth_TE
    for token, (score_E, by_sum_E) in enumerate(zip(score_TE.tolist(), by_sum_TE.tolist(), strict=True)):
        group_scores = [_group_score([by_sum_E[e] for e in group], config.router.group_rule) for group in groups]
        kept, group_gap = _best(group_scores, list(range(config.router.num_groups)), config.router.groups_kept)
        candidates = [e for g in sorted(kept) for e in groups[g]]
        chosen, expert_gap = _best([score_E[e] for e in candidates], candidates, config.moe.top_k)
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
    logit_TE: Tensor, choice: Choice, config: MoELayerConfig, lagged_count_E: Tensor, num_step_tokens: int
) -> Tensor:
    """Balance loss and z-loss of one micro-batch in one layer (arXiv 2501.11873; ST-MoE for the z-loss).

    balance_coef * E * sum_i f_i P_i + z_loss_coef * mean logsumexp^2, where P_i and the mean run over all tokens of
    the optimizer step: each micro-batch adds its own sums divided by ``num_step_tokens``. The share f is a constant:
    of the previous step's counts over all ranks (``lagged``; 1 / E where there are none), or of this micro-batch's
    own counts (``micro``). Perfect balance gives 1 * balance_coef.
    """
    z_loss = config.balance.z_loss_coef * logit_TE.logsumexp(dim=-1).square().sum()
    if config.balance.scope == "none":
        return z_loss / num_step_tokens
    count_E = (choice.count_E if config.balance.scope == "micro" else lagged_count_E).to(logit_TE.dtype)
    total = count_E.sum()
    share_E = count_E / total if total > 0 else torch.full_like(count_E, 1 / config.moe.num_experts)
    balance = config.balance.coef * config.moe.num_experts * (share_E * choice.prob_sum_E).sum()
    return (balance + z_loss) / num_step_tokens


def moved_bias(bias_E: Tensor, count_E: Tensor, balance: BalanceConfig) -> Tensor:
    """The selection bias after an optimizer step: b + u * sign(mean(c) - c) (Wang et al., 2408.15664)."""
    if not balance.loss_free:
        return bias_E
    return bias_E + balance.bias_rate * torch.sign(count_E.sum() - count_E * len(count_E)).to(bias_E.dtype)
