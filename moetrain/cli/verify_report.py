"""How far the parallel run is from the oracle, and whether that is rounding."""

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import moetrain
from moetrain.cli.verify_spec import VerifySpec

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


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The answer of one comparison. ``error`` says what kept it from finishing, or is None."""

    spec: VerifySpec
    steps: tuple[StepErrors, ...] = ()
    skipped_seeds: tuple[int, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    @property
    def tolerance(self) -> float:
        """The largest relative error that rounding explains."""
        return TOLERANCE[self.spec.dtype]

    @property
    def max_rel_error_loss(self) -> float:
        """Of the loss and of its auxiliary part."""
        return max((max(step.loss, step.aux) for step in self.steps), default=math.inf)

    @property
    def max_rel_error_grad(self) -> float:
        """Of all gradients, and of their norm before clipping."""
        return max((max(step.grad_norm, *step.grads.values()) for step in self.steps), default=math.inf)

    @property
    def max_rel_error_param(self) -> float:
        """Of all parameters after a step, and of the selection biases."""
        return max((max(step.bias, *step.params.values(), 0.0) for step in self.steps), default=math.inf)

    @property
    def wrong_counts(self) -> int:
        """Expert loads that differ, over all steps."""
        return sum(step.wrong_counts for step in self.steps)

    @property
    def ok(self) -> bool:
        """Whether everything was compared and lies within the tolerance."""
        errors = (self.max_rel_error_loss, self.max_rel_error_grad, self.max_rel_error_param)
        finished = self.error is None and len(self.steps) == self.spec.num_steps
        return finished and all(error <= self.tolerance for error in errors) and self.wrong_counts == 0

    def worst_tensors(self, kind: str, count: int) -> list[tuple[str, float]]:
        """The ``count`` tensors of ``kind`` (``"grads"`` or ``"params"``) with the largest error in any step."""
        worst: dict[str, float] = {}
        for step in self.steps:
            for name, error in getattr(step, kind).items():
                worst[name] = max(error, worst.get(name, 0.0))
        return sorted(worst.items(), key=lambda pair: -pair[1])[:count]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; an error that is not finite becomes null."""
        return _finite(
            {
                "ok": self.ok,
                "max_rel_error_loss": self.max_rel_error_loss,
                "max_rel_error_grad": self.max_rel_error_grad,
                "max_rel_error_param": self.max_rel_error_param,
                "wrong_counts": self.wrong_counts,
                "tolerance": self.tolerance,
                "error": self.error,
                "steps": [asdict(step) for step in self.steps],
                "spec": asdict(self.spec),
                "mesh": asdict(self.spec.mesh_config()),
                "dispatch": self.spec.two_levels_in_words() if self.spec.two_level else "in one level",
                "skipped_seeds": list(self.skipped_seeds),
                "seconds": self.seconds,
                "versions": versions(),
            }
        )


def versions() -> dict[str, str]:
    """What the comparison ran on."""
    return {"moetrain": moetrain.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
