"""The learning rate as a function of the optimizer step: linear warm-up, then a cosine."""

import math

from moetrain.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Learning rate of 0-based ``step`` in a run of ``num_steps``.

    It rises linearly and reaches ``optim.lr`` at the last warm-up step, then follows half a cosine down to
    ``optim.lr * optim.min_lr_ratio`` at ``num_steps``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * cosine)
