"""Token rounding in plain torch: the definition that tests and benchmarks hold the native operators to.

Shapes: T tokens of all ranks of a group, E experts, M rows of a tile.
"""

import torch
from torch import Tensor

from moetrain.config.moe import RoundRule
from moetrain.ops.counter_random import counter_uniform


def round_pairs_reference(
    score_TE: Tensor,
    chosen_TE: Tensor,
    token_gid_T2: Tensor,
    tile: int,
    rule: RoundRule,
    *,
    key: int = 0,
    valid_T: Tensor | None = None,
    holder_TE: Tensor | None = None,
) -> Tensor:
    """The (token, expert) pairs after rounding, bool ``[T, E]``; see ``moetrain.ops.round_pairs``.

    Args:
        score_TE: of any floating dtype.
        chosen_TE: bool, the pairs before.
        token_gid_T2: int64 (sequence, position), distinct.
        tile: M.
        rule: one of the six.
        key: of the draws.
        valid_T: bool; others fill nothing.
        holder_TE: to which holder a token's pair with an expert would go; one holder each if left out.
    """
    num_experts = score_TE.shape[1]
    valid_T = torch.ones_like(chosen_TE[:, 0]) if valid_T is None else valid_T
    holder_TE = torch.zeros_like(chosen_TE, dtype=torch.int64) if holder_TE is None else holder_TE
    draw_E = counter_uniform(key, torch.arange(num_experts), dtype=torch.float64).tolist()
    by_gid_T = token_gid_T2[:, 1].argsort(stable=True)
    by_gid_T = by_gid_T[token_gid_T2[by_gid_T, 0].argsort(stable=True)]
    kept_TE = torch.zeros_like(chosen_TE)
    surplus = 0
    for expert in range(num_experts):
        for holder in holder_TE[:, expert].unique().tolist():
            cell_T = valid_T & (holder_TE[:, expert] == holder)
            ranking = by_gid_T[cell_T[by_gid_T]]
            ranking = ranking[score_TE[ranking, expert].sort(descending=True, stable=True).indices]
            ranking = ranking[chosen_TE[ranking, expert].int().sort(descending=True, stable=True).indices]
            num_chosen = int(chosen_TE[ranking, expert].sum())
            rows = rounded_rows(score_TE[ranking, expert].tolist(), num_chosen, tile, rule, draw_E[expert], surplus)
            kept_TE[ranking[:rows], expert] = True
            surplus += rows - num_chosen
    return kept_TE


def rounded_rows(scores: list[float], num_chosen: int, tile: int, rule: RoundRule, draw: float, surplus: int) -> int:
    """Rows that one cell keeps.

    Args:
        scores: of all tokens of the cell in the order of their rank, the ``num_chosen`` chosen ones first.
        num_chosen: f.
        tile: M.
        rule: one of the six.
        draw: uniform in [0, 1).
        surplus: rows added in the cells before, less those dropped.
    """
    down = num_chosen - num_chosen % tile
    up = down + tile
    if down == num_chosen or len(scores) < tile:
        return num_chosen
    if up > len(scores):
        return down
    lost, gained = sum(reversed(scores[down:num_chosen])), sum(scores[num_chosen:up])
    goes_up = {
        "nearest": up - num_chosen < num_chosen - down,
        "stochastic": draw * tile < num_chosen - down,
        "nearest_score": draw * (lost + gained) < lost,
        "balance": abs(surplus + up - num_chosen) < abs(surplus + down - num_chosen),
        "up": True,
        "down": False,
    }[rule]
    return up if goes_up else down
