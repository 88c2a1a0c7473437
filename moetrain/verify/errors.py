"""How far numbers of a parallel run are from the oracle's, and how far rounding may take them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {"float32": 1e-5, "float64": 1e-11}


def relative_error(actual: Tensor | None, expected: Tensor, largest: float) -> float:
    """max|a - b| / max(max|b|, 0.01 * largest): 0 where both are zero, infinite where they cannot be compared.

    Args:
        actual: a, of the parallel run; None where it has no such tensor.
        expected: b, of the oracle.
        largest: magnitude of the largest element of all tensors of the kind (gradients, or parameters).
    """
    if actual is None or actual.shape != expected.shape:
        return math.inf
    if not (bool(actual.isfinite().all()) and bool(expected.isfinite().all())):
        return math.inf
    if expected.numel() == 0:
        return 0.0
    difference = float((actual.double() - expected.double()).abs().max())
    if difference == 0.0:
        return 0.0
    scale = max(float(expected.abs().max()), 0.01 * largest)
    return difference / scale if scale > 0 else math.inf


def scales_of(expected: Mapping[str, Tensor]) -> dict[str, float]:
    """What the largest difference of each tensor is divided by: max(max|b|, 0.01 * the largest of all tensors)."""
    most = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()}
    largest = max(most.values(), default=0.0)
    return {name: max(value, 0.01 * largest) for name, value in most.items()}


def scalar_error(actual: float, expected: float) -> float:
    """|a - b| / |b|."""
    return relative_error(torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), 0.0)


@dataclass(frozen=True, slots=True)
class StepErrors:
    """Relative errors of one step; the worst over all ranks."""

    loss: float  # mean cross-entropy plus auxiliary losses
    aux: float
    grad_norm: float  # before clipping
    grads: dict[str, float]
    params: dict[str, float]  # empty where parameters are not compared
    bias: float  # selection biases after the step
    wrong_counts: int  # (layer, expert) pairs whose number of choices differs

    @staticmethod
    def worst(of_ranks: "list[StepErrors]") -> "StepErrors":
        """The largest error of any rank in each place."""

        def most(name: str) -> Any:
            return max(getattr(errors, name) for errors in of_ranks)

        def most_of_each(name: str) -> dict[str, float]:
            names = {key for errors in of_ranks for key in getattr(errors, name)}
            return {key: max(getattr(errors, name).get(key, 0.0) for errors in of_ranks) for key in sorted(names)}

        return StepErrors(
            loss=most("loss"),
            aux=most("aux"),
            grad_norm=most("grad_norm"),
            grads=most_of_each("grads"),
            params=most_of_each("params"),
            bias=most("bias"),
            wrong_counts=most("wrong_counts"),
        )
