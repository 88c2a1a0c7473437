import math
from typing import Any

import pytest
import torch

from moetrain.config import OptimConfig
from moetrain.oracle.optimizer import Optimizer, clipped, global_norm, has_decay, learning_rate

SHAPES = {
    "embed.weight": (5, 3),
    "layers.0.attn_norm.weight": (3,),
    "layers.0.attn.q.bias": (4,),
    "layers.0.moe.experts.w_in": (2, 2, 4, 3),
    "layers.0.moe.router.weight": (2, 3),
    "lm_head.weight": (5, 3),
}


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (6, 0.55), (8, 0.1), (20, 0.1)],
)
def test_schedule_by_hand(step: int, expected: float) -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    assert learning_rate(optim, step, 8) == pytest.approx(expected, rel=1e-15)


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(OptimConfig(lr=0.5, warmup_steps=0), 0, 10) == 0.5


def test_decay_spares_norms_biases_and_embeddings() -> None:
    decayed = {name for name, value in values(0).items() if has_decay(name, value)}
    assert decayed == {"layers.0.moe.experts.w_in", "layers.0.moe.router.weight", "lm_head.weight"}


def run_torch(optim: OptimConfig, steps: int) -> dict[str, torch.Tensor]:
    params = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
    groups = [
        {"params": [p for n, p in params.items() if has_decay(n, p)], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in params.items() if not has_decay(n, p)], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if optim.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=optim.lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    for step in range(steps):
        for name, grad in values(step + 1).items():
            params[name].grad = grad
        torch.nn.utils.clip_grad_norm_(list(params.values()), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, steps)
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


def run_oracle(optim: OptimConfig, steps: int) -> dict[str, torch.Tensor]:
    params, optimizer = values(0), Optimizer(optim, steps)
    for step in range(steps):
        params = optimizer.step(params, clipped(values(step + 1), optim.clip_norm))
    return params


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_five_steps_equal_torch(name: Any) -> None:
    optim = OptimConfig(name=name, lr=0.1, warmup_steps=2, clip_norm=2.0, weight_decay=0.3)
    expected, actual = run_torch(optim, 5), run_oracle(optim, 5)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"clip_norm": 1.0}, {"lr": 0.2}])
def test_another_setting_would_be_noticed(name: str, wrong: dict[str, float]) -> None:
    settings: dict[str, Any] = {
        "name": name,
        "lr": 0.1,
        "warmup_steps": 2,
        "clip_norm": 2.0,
        "weight_decay": 0.3,
        "eps": 0.1,
    }
    expected, actual = run_torch(OptimConfig(**settings), 2), run_oracle(OptimConfig(**{**settings, **wrong}), 2)
    worst = max(float((actual[key] - expected[key]).abs().max()) for key in expected)
    assert worst > 1e-4


def test_norm_counts_every_element_once() -> None:
    grads = {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}
    assert global_norm(grads) == 5.0
    torch.testing.assert_close(clipped(grads, 1.0)["b"], torch.tensor([[0.0, 0.8]]), rtol=1e-6, atol=0)
    assert clipped(grads, 10.0)["b"].tolist() == [[0.0, 4.0]]
    assert clipped(grads, 0.0)["b"].tolist() == [[0.0, 4.0]]


def test_zero_gradients_stay_zero() -> None:
    grads = {"a": torch.zeros(2)}
    assert clipped(grads, 1.0)["a"].tolist() == [0.0, 0.0]
    assert not math.isnan(global_norm(grads))
