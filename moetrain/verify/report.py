"""The answer of one comparison: how far the parallel run is from the oracle, and whether that is rounding."""

import math
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import moetrain
from moetrain.verify.errors import TOLERANCE, StepErrors
from moetrain.verify.spec import VerifySpec


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
                "spec": self.spec.to_json(),
                "mesh": asdict(self.spec.run.mesh),
                "dispatch": self.spec.two_levels_in_words() if self.spec.run.mesh.two_level else "in one level",
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
