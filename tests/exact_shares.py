"""Routing weights, probabilities and their gradients in numbers of 60 digits and any exponent.

No score is too small here, so nothing guards a sum: what shares a guard with the code under test cannot see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mpmath import mp, mpf

mp.dps = 60


@dataclass(frozen=True, slots=True)
class Token:
    """What one token's logits and choice give."""

    weights: list[mpf]  # of the chosen, in their order
    probs: list[mpf]  # of all experts
    gradient: list[mpf]  # d (sum of pulls times weights and probabilities) / d logits


def score_of(kind: str, logit: float) -> mpf:
    x = mpf(logit)
    if kind == "sigmoid":
        return 1 / (1 + mp.exp(-x))
    return mp.sqrt(mp.log1p(mp.exp(x))) if kind == "sqrtsoftplus" else mp.exp(x)


def log_slope_of(kind: str, logit: float) -> mpf:
    """d log(score) / d logit."""
    x = mpf(logit)
    if kind == "sigmoid":
        return 1 / (1 + mp.exp(x))
    return 1 / (1 + mp.exp(-x)) / (2 * mp.log1p(mp.exp(x))) if kind == "sqrtsoftplus" else mpf(1)


def exact_token(
    logits: Sequence[float],
    chosen: Sequence[int],
    kind: str,
    *,
    renormalise: bool = True,
    weight_pulls: Sequence[float] = (),
    prob_pulls: Sequence[float] = (),
) -> Token:
    """Weights of the ``chosen`` (scale 1), probabilities, and the gradient that the pulls give."""
    scores = [score_of(kind, logit) for logit in logits]
    probs = [score / sum(scores) for score in scores]
    weight_pull = dict(zip(chosen, map(mpf, weight_pulls or [0] * len(chosen)), strict=True))
    prob_pull = list(map(mpf, prob_pulls or [0] * len(logits)))
    own = [mpf(0)] * len(logits)  # d / d log(score) of what the weights are pulled by
    if renormalise or kind == "topk_softmax":
        weights = {e: scores[e] / sum(scores[i] for i in chosen) for e in chosen}
        mean = sum(weights[e] * weight_pull[e] for e in chosen)
        for e in chosen:
            own[e] = weights[e] * (weight_pull[e] - mean)
    elif kind == "softmax":  # the weights are the probabilities
        weights = {e: probs[e] for e in chosen}
        for e in chosen:
            prob_pull[e] += weight_pull[e]
    else:
        weights = {e: scores[e] for e in chosen}
        for e in chosen:
            own[e] = scores[e] * weight_pull[e]
    mean = sum(prob * pull for prob, pull in zip(probs, prob_pull, strict=True))
    gradient = [
        log_slope_of(kind, logit) * (prob * (pull - mean) + own_e)
        for logit, prob, pull, own_e in zip(logits, probs, prob_pull, own, strict=True)
    ]
    return Token([weights[e] for e in chosen], probs, gradient)
