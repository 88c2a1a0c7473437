from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn

from moetrain.config import OptimConfig
from moetrain.models.names import logical
from moetrain.oracle.optimizer import Optimizer as OracleOptimizer
from moetrain.train.optimizer import make_optimizer, moments, num_updates, set_learning_rate, set_num_updates
from moetrain.train.shards import Shard, decays


def make_shard(name: str, value: torch.Tensor) -> Shard:
    parameter = nn.Parameter(value.clone())
    return Shard(name, tuple(value.shape), (0,) * value.dim(), parameter, parameter, decays(name, value.dim()))


@pytest.mark.parametrize(
    ("name", "num_dims", "expected"),
    [
        ("embed.weight", 2, False),
        ("layers.0.attn_norm.weight", 1, False),
        ("layers.0.attn.q.bias", 1, False),
        ("final_norm.weight", 1, False),
        ("lm_head.weight", 2, True),
        ("layers.0.attn.q.weight", 2, True),
        ("layers.1.moe.router.weight", 2, True),
        ("layers.1.moe.shared.w_in", 3, True),
        ("layers.1.moe.experts.w_in", 4, True),
    ],
)
def test_decay_acts_on_matrices_alone(name: str, num_dims: int, expected: bool) -> None:
    assert decays(name, num_dims) is expected


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_three_updates_equal_the_definition(kind: Literal["adamw", "sgd"]) -> None:
    torch.manual_seed(0)
    optim = OptimConfig(name=kind, lr=0.1, warmup_steps=0, min_lr_ratio=1.0, weight_decay=0.3)
    start = {"layers.0.attn.q.weight": torch.randn(3, 4).double(), "embed.weight": torch.randn(5, 2).double()}
    shards = [make_shard(name, value) for name, value in start.items()]
    optimizer, oracle, expected = make_optimizer(shards, optim), OracleOptimizer(optim, 3), dict(start)
    for _ in range(3):
        grads = {name: torch.randn_like(value) for name, value in start.items()}
        for shard in shards:
            shard.value.grad = grads[shard.name].clone()
        optimizer.step()
        expected = oracle.step(expected, grads)
    for shard in shards:
        torch.testing.assert_close(shard.value.detach(), expected[shard.name], rtol=1e-13, atol=1e-13)
    undecayed = OracleOptimizer(OptimConfig(name=kind, lr=0.1, warmup_steps=0, min_lr_ratio=1.0, weight_decay=0.0), 3)
    wrong = undecayed.step(start, dict.fromkeys(start, torch.zeros(())))
    assert not torch.allclose(wrong["layers.0.attn.q.weight"], expected["layers.0.attn.q.weight"], atol=1e-3)


def test_the_learning_rate_is_the_one_that_was_set() -> None:
    shard = make_shard("w", torch.ones(2, 2))
    optimizer = make_optimizer([shard], OptimConfig(name="sgd", weight_decay=0.0))
    set_learning_rate(optimizer, 0.25)
    shard.value.grad = torch.full((2, 2), 2.0)
    optimizer.step()
    assert shard.value.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_moments_exist_before_the_first_step_and_survive_a_number_of_updates() -> None:
    shard = make_shard("w", torch.ones(2, 2))
    optimizer = make_optimizer([shard], OptimConfig())
    assert {name: value.tolist() for name, value in moments(optimizer, shard).items()} == {
        "exp_avg": [[0.0, 0.0], [0.0, 0.0]],
        "exp_avg_sq": [[0.0, 0.0], [0.0, 0.0]],
    }
    assert num_updates(optimizer) == 0
    set_num_updates(optimizer, 7)
    shard.value.grad = torch.ones(2, 2)
    optimizer.step()
    assert num_updates(optimizer) == 8


def test_sgd_has_no_moments_and_empty_shards_have_empty_ones() -> None:
    full, empty = make_shard("w", torch.ones(2, 2)), make_shard("v", torch.ones(0, 2))
    assert moments(make_optimizer([full], OptimConfig(name="sgd")), full) == {}
    found = moments(make_optimizer([full, empty], OptimConfig()), empty)
    assert {name: tuple(moment.shape) for name, moment in found.items()} == {"exp_avg": (0, 2), "exp_avg_sq": (0, 2)}


def test_an_empty_shard_of_experts_stays_with_the_optimizer_where_experts_move() -> None:
    """It may come to own some; a dense one does not."""
    shards = [make_shard("w", torch.ones(2, 2)), make_shard("v", torch.ones(0, 2))]
    experts = replace(make_shard("experts", torch.ones(0, 2)), expert_layer=0)
    for keep_empty, num_stepped in ((False, 1), (True, 2)):
        optimizer = make_optimizer([*shards, experts], OptimConfig(), keep_empty=keep_empty)
        stepped = [value for group in optimizer.param_groups for value in group["params"]]
        assert len(stepped) == num_stepped
        assert any(value is experts.value for value in stepped) == keep_empty


def test_a_rank_that_owns_nothing_still_steps() -> None:
    optimizer = make_optimizer([make_shard("v", torch.ones(0, 2))], OptimConfig())
    optimizer.step()
    assert num_updates(optimizer) == 0


def test_wrappers_leave_no_trace_in_names() -> None:
    assert logical("layers.0._checkpoint_wrapped_module.attn._orig_mod.q.weight") == "layers.0.attn.q.weight"
