"""The schedule, clipping, SGD and AdamW, written from their definitions, on a dictionary of tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moetrain.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then half a cosine down to ``lr * min_lr_ratio``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def has_decay(name: str, value: Tensor) -> bool:
    """Weight decay acts on matrices alone: not on norms, biases and embeddings."""
    return value.dim() >= 2 and name != "embed.weight"


def global_norm(grads: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all elements of all gradients, each counted once."""
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))


def clipped(grads: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Gradients times min(1, clip_norm / (norm + 1e-6)), as torch's ``clip_grad_norm_``; 0 turns clipping off."""
    factor = min(1.0, clip_norm / (global_norm(grads) + 1e-6)) if clip_norm > 0 else 1.0
    return {name: grad * factor for name, grad in grads.items()}


@dataclass(slots=True)
class Optimizer:
    """SGD (p -= lr * (g + decay * p)) or AdamW (Loshchilov and Hutter, decoupled decay)."""

    config: OptimConfig
    num_steps: int
    step_idx: int = 0  # of the schedule
    num_updates: int = 0  # without the steps that were skipped
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New parameters from clipped gradients; moments and the step number move on."""
        lr = learning_rate(self.config, self.step_idx, self.num_steps)
        self.step_idx += 1
        self.num_updates += 1
        update = self._adamw if self.config.name == "adamw" else self._sgd
        return {name: update(name, value, grads[name], lr) for name, value in params.items()}

    def skip(self) -> None:
        """Pass over a step: the schedule goes on, moments stay."""
        self.step_idx += 1

    def _sgd(self, name: str, value: Tensor, grad: Tensor, lr: float) -> Tensor:
        decay = self.config.weight_decay if has_decay(name, value) else 0.0
        return value - lr * (grad + decay * value)

    def _adamw(self, name: str, value: Tensor, grad: Tensor, lr: float) -> Tensor:
        beta1, beta2 = self.config.beta1, self.config.beta2
        zero = torch.zeros_like(grad)
        first = beta1 * self.first.get(name, zero) + (1 - beta1) * grad
        second = beta2 * self.second.get(name, zero) + (1 - beta2) * grad.square()
        self.first[name], self.second[name] = first, second
        unbiased_first = first / (1 - beta1**self.num_updates)
        unbiased_second = second / (1 - beta2**self.num_updates)
        decay = self.config.weight_decay if has_decay(name, value) else 0.0
        return value - lr * (unbiased_first / (unbiased_second.sqrt() + self.config.eps) + decay * value)
