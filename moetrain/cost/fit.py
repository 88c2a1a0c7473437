"""Fits what a pass over sequences costs to what was measured. Shapes: N measurements, K kinds of cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moetrain.config.errors import require
from moetrain.cost.sequence_costs import PassCosts

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TimedItem:
    """One rank's pass over some sequences, one after another.

    Args:
        lengths: tokens of each.
        ms: of the pass, more than 0.
    """

    lengths: tuple[int, ...]
    ms: float


def fit_pass(items: Sequence[TimedItem]) -> tuple[PassCosts, float]:
    """Costs of squared tokens, of tokens and of an item by which these items take what they took.

    Least squares of relative errors, without negative costs.

    Returns:
        The costs, those of rings 0; and the largest relative error.

    Raises:
        ValueError: fewer than three items, or a time that is not positive.
    """
    require(len(items) >= 3, f"fit_pass: items must be at least 3, got {len(items)}; measure more lengths")
    least = min(item.ms for item in items)
    require(least > 0, f"fit_pass: times must be positive, got {least} ms; measure longer sequences")
    features_NK = np.array([[sum(n * n for n in item.lengths), sum(item.lengths), 1.0] for item in items])
    features_NK /= np.array([[item.ms] for item in items])
    costs_K = _least_squares(features_NK)
    worst = float(np.abs(features_NK @ costs_K - 1.0).max())
    square_ms, token_ms, item_ms = costs_K.tolist()
    return PassCosts(square_ms=square_ms, token_ms=token_ms, item_ms=item_ms), worst


def _least_squares(features_NK: Floats) -> Floats:
    """The x >= 0 for which features @ x is nearest to ones: of every choice of numbers above 0, the best."""
    num_kinds = features_NK.shape[1]
    best_K, least = np.zeros(num_kinds), np.inf
    for size in range(1, num_kinds + 1):
        for kinds in map(list, combinations(range(num_kinds), size)):
            found_K = np.zeros(num_kinds)
            scale_K = np.abs(features_NK[:, kinds]).max(axis=0)  # squares of tokens are far larger than ones
            found_K[kinds] = np.linalg.lstsq(features_NK[:, kinds] / scale_K, np.ones(len(features_NK)))[0] / scale_K
            error = float(((features_NK @ found_K - 1.0) ** 2).sum())
            if (found_K >= 0).all() and error < least:
                best_K, least = found_K, error
    return best_K
