"""Predicts the loads of the next step from those seen. Shapes: L layers, N nodes, E experts.

Counts of a step are [L, N, E]: the pairs that the tokens of each node made for each expert.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from moetrain.config.errors import require, require_one_of


class LoadPredictor(ABC):
    """What every rule shares: the shape of counts, and how wrong the last prediction was.

    ``error`` is that of the last step that had been predicted: the sum of absolute differences over the sum of what
    came; 0 is perfect, 2 the worst. None until a prediction has met its step.
    """

    def __init__(self, num_layers: int, num_nodes: int, num_experts: int) -> None:
        self.shape = (num_layers, num_nodes, num_experts)
        self.error: float | None = None

    def observe(self, count_LNE: Tensor) -> None:
        """Take in the counts of a step that is through.

        Raises:
            ValueError: counts of another shape, negative or not finite.
        """
        require(
            tuple(count_LNE.shape) == self.shape,
            f"counts must be [layers, nodes, experts] = {list(self.shape)}, got {list(count_LNE.shape)}",
        )
        count_LNE = count_LNE.detach().to("cpu", torch.float32)
        least, most = (count_LNE.min().item(), count_LNE.max().item()) if count_LNE.numel() else (0.0, 0.0)
        require(
            least >= 0 and most < float("inf"),
            f"counts must be finite and at least 0, got values from {least} to {most}; this step counts for nothing",
        )
        predicted_LNE = self.predict()
        if predicted_LNE is not None:
            self.error = relative_error(predicted_LNE, count_LNE)
        self._add(count_LNE)

    @abstractmethod
    def predict(self) -> Tensor | None:
        """Float32 [L, N, E] for the next step; None before anything was seen."""

    @abstractmethod
    def _add(self, count_LNE: Tensor) -> None: ...

    @abstractmethod
    def _seen(self) -> list[Tensor]:
        """The state: counts, oldest first."""

    @abstractmethod
    def _set_seen(self, seen: list[Tensor]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"seen": [count_LNE.clone() for count_LNE in self._seen()], "error": self.error}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from a checkpoint; False where only totals over nodes could be kept, because their number is another.

        Totals are then spread evenly over the nodes.

        Raises:
            ValueError: other layers or experts.
        """
        num_layers, num_nodes, num_experts = self.shape
        seen: list[Tensor] = state["seen"]
        for count_LNE in seen:
            require(
                count_LNE.dim() == 3 and (count_LNE.shape[0], count_LNE.shape[2]) == (num_layers, num_experts),
                f"saved loads must be of {num_layers} layers and {num_experts} experts, got "
                f"[layers, nodes, experts] = {list(count_LNE.shape)}; resume with the model that saved them",
            )
        same = all(count_LNE.shape[1] == num_nodes for count_LNE in seen)
        if not same:
            means = [count_LNE.sum(1, keepdim=True) / num_nodes for count_LNE in seen]
            seen = [mean_L1E.expand(-1, num_nodes, -1) for mean_L1E in means]
        self._set_seen([count_LNE.to("cpu", torch.float32).clone() for count_LNE in seen])
        self.error = state["error"]
        return same


class MeanPredictor(LoadPredictor):
    """The mean of the last steps; Hecate takes five."""

    STEPS = 5

    def __init__(self, num_layers: int, num_nodes: int, num_experts: int) -> None:
        super().__init__(num_layers, num_nodes, num_experts)
        self._window: list[Tensor] = []

    def predict(self) -> Tensor | None:
        """The mean of what the window holds."""
        return torch.stack(self._window).mean(0) if self._window else None

    def _add(self, count_LNE: Tensor) -> None:
        self._window = [*self._window, count_LNE.clone()][-self.STEPS :]

    def _seen(self) -> list[Tensor]:
        return self._window

    def _set_seen(self, seen: list[Tensor]) -> None:
        self._window = seen[-self.STEPS :]


class EmaPredictor(LoadPredictor):
    """An exponential mean: a step weighs a fifth of the one after it.

    Loads that drift as a random walk are predicted best by nearly the last step alone; what little memory remains
    lessens the noise of small counts.
    """

    NEWEST = 0.8

    def __init__(self, num_layers: int, num_nodes: int, num_experts: int) -> None:
        super().__init__(num_layers, num_nodes, num_experts)
        self._mean: Tensor | None = None

    def predict(self) -> Tensor | None:
        """The mean so far."""
        return None if self._mean is None else self._mean.clone()

    def _add(self, count_LNE: Tensor) -> None:
        self._mean = count_LNE.clone() if self._mean is None else torch.lerp(self._mean, count_LNE, self.NEWEST)

    def _seen(self) -> list[Tensor]:
        return [] if self._mean is None else [self._mean]

    def _set_seen(self, seen: list[Tensor]) -> None:
        self._mean = seen[-1] if seen else None


PREDICTORS: dict[str, type[LoadPredictor]] = {"mean": MeanPredictor, "ema": EmaPredictor}


def make_predictor(rule: str, num_layers: int, num_nodes: int, num_experts: int) -> LoadPredictor:
    """The predictor of a configured name.

    Raises:
        ValueError: no predictor has that name.
    """
    require_one_of("placement.predictor", rule, PREDICTORS)
    return PREDICTORS[rule](num_layers, num_nodes, num_experts)


def relative_error(predicted_LNE: Tensor, count_LNE: Tensor) -> float:
    """Sum of absolute differences over the sum of what came; 0 where nothing came and nothing was expected."""
    off = float((predicted_LNE.double() - count_LNE.double()).abs().sum())
    total = float(count_LNE.double().sum())
    return off / total if total > 0 else float(off > 0) * 2
