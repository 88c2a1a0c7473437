import math

import pytest

from moetrain.config import OptimConfig
from moetrain.train.learning_rate import learning_rate

OPTIM = OptimConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=4)


def test_warm_up_is_linear_and_reaches_lr_at_its_last_step() -> None:
    assert [learning_rate(step, OPTIM, 24) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_cosine_runs_from_lr_to_the_floor() -> None:
    assert learning_rate(4, OPTIM, 24) == 2.0
    assert learning_rate(14, OPTIM, 24) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(19, OPTIM, 24) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.75))))
    assert learning_rate(24, OPTIM, 24) == pytest.approx(0.2)
    assert learning_rate(99, OPTIM, 24) == pytest.approx(0.2)


def test_no_warm_up_and_warm_up_alone() -> None:
    assert learning_rate(0, OptimConfig(lr=2.0, warmup_steps=0), 10) == 2.0
    assert learning_rate(3, OPTIM, 4) == 2.0
    assert learning_rate(4, OPTIM, 4) == 2.0


def test_it_is_the_oracles_schedule() -> None:
    from moetrain.oracle.optimizer import learning_rate as oracle

    for step in range(30):
        assert learning_rate(step, OPTIM, 25) == pytest.approx(oracle(OPTIM, step, 25), rel=1e-15)
