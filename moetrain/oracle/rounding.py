"""Token rounding as its definition reads (SonicMoE, arXiv 2512.14080), one expert at a time.

Shapes: T tokens of one domain (what the ranks of a dispatch group process in one round), E experts, M rows of a tile.
"""

import torch
from torch import Tensor

from moetrain.config import DispatchConfig, MoELayerConfig
from moetrain.oracle.routing import log_scores_of, scores_of, shares


def round_weights(
    logit_TE: Tensor, chosen_TE: Tensor, weight_TE: Tensor, config: MoELayerConfig, draw_E: list[float]
) -> tuple[Tensor, float]:
    """Make each expert's number of tokens a multiple of ``dispatch.tile``.

    Tokens are ranked on (chosen, score); the first so many are kept. Chosen ones keep their weight, others weigh
    their raw score: the softmax over all experts, for a sigmoid router its share of all experts' scores (or, where
    weights are not renormalised, the score itself).

    Args:
        logit_TE: The router's.
        chosen_TE: bool, before rounding.
        weight_TE: 0 where not chosen.
        config: The rule, the tile, and how the router scores.
        draw_E: Uniform in [0, 1), for rules that draw.

    Returns:
        The weights, 0 where a token does not go, and the least gap of any decision.
    """
    score_TE = shares(log_scores_of(logit_TE, config)) if config.router.renormalise else scores_of(logit_TE, config)
    kept_TE = torch.zeros_like(chosen_TE)
    surplus, gap = 0, float("inf")
    for expert in range(config.moe.num_experts):
        pairs = zip(chosen_TE[:, expert].tolist(), score_TE[:, expert].tolist(), strict=True)
        ranking = sorted((((*pair, -token) for token, pair in enumerate(pairs))), reverse=True)
        chosen, scores = sum(pair[0] for pair in ranking), [pair[1] for pair in ranking]
        rows, rule_gap = rounded_rows(scores, chosen, config.dispatch, draw_E[expert], surplus)
        surplus += rows - chosen
        kept_TE[[-pair[2] for pair in ranking[:rows]], expert] = True
        margin = scores[rows - 1] - scores[rows] if rows != chosen and 0 < rows < len(scores) else float("inf")
        gap = min(gap, rule_gap, margin)
    raw_TE = torch.where(chosen_TE, weight_TE, score_TE * config.router.weight_scale)
    return torch.where(kept_TE, raw_TE, 0.0), gap


def rounded_rows(
    scores: list[float], num_chosen: int, dispatch: DispatchConfig, draw: float, surplus: int
) -> tuple[int, float]:
    """How many tokens one expert keeps, and how near the rule was to another number.

    Args:
        scores: In the order of rank, those of the ``num_chosen`` chosen first.
        num_chosen: f.
        dispatch: The rule and the tile.
        draw: Uniform in [0, 1).
        surplus: What rounding has added to the experts before this one, less what it dropped.
    """
    sure = float("inf")
    over = num_chosen % dispatch.tile
    down, up = num_chosen - over, num_chosen - over + dispatch.tile
    if over == 0 or len(scores) < dispatch.tile:
        return num_chosen, sure
    if up > len(scores):
        return down, sure
    if dispatch.rounding == "nearest":
        return (up if dispatch.tile - over < over else down), sure
    if dispatch.rounding == "balance":
        return (up if abs(surplus + dispatch.tile - over) < abs(surplus - over) else down), sure
    if dispatch.rounding == "stochastic":
        return (up if draw * dispatch.tile < over else down), sure
    if dispatch.rounding == "nearest_score":
        lost, gained = sum(scores[down:num_chosen]), sum(scores[num_chosen:up])
        return (up if draw * (lost + gained) < lost else down), abs(draw * (lost + gained) - lost)
    return (up if dispatch.rounding == "up" else down), sure
