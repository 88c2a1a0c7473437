import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from layer_configs import layer_tables

from moetrain.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from moetrain.oracle import Document, MicroBatch, OracleStep, OracleTrainer, random_parameters

MODEL = ModelConfig(vocab_size=11, num_layers=2, width=6, num_heads=2, num_kv_heads=1, head_dim=4)


def run_config(steps: int = 4, **layer: object) -> RunConfig:
    return RunConfig(
        model=MODEL,
        **layer_tables(**{"num_experts": 4, "top_k": 2, "expert_width": 5, "balance_coef": 0.5, **layer}),
        optim=OptimConfig(name="sgd", lr=0.5, warmup_steps=0, clip_norm=0.0, weight_decay=0.0),
        train=TrainConfig(steps=steps),
    )


def trainer(run: RunConfig) -> OracleTrainer:
    return OracleTrainer(random_parameters(run.model, run.moe, seed=1, dtype=torch.float64), run)


def document(length: int, loss_tokens: int, seed: int) -> Document:
    generator = torch.Generator().manual_seed(seed)
    token_id_S, target_S = (torch.randint(0, 11, (length,), generator=generator) for _ in range(2))
    target_S[loss_tokens:] = -1
    return Document(token_id_S, target_S, torch.arange(length))


FIRST, SECOND, THIRD = document(7, 7, 1), document(5, 1, 2), document(3, 0, 3)
EMPTY = MicroBatch(())


def difference(a: OracleStep, b: OracleStep) -> float:
    return max(float((a.grads[name] - b.grads[name]).abs().max()) for name in b.grads)


SPLITS = [
    [MicroBatch((FIRST, SECOND, THIRD))],
    [MicroBatch((FIRST,)), EMPTY, MicroBatch((SECOND, THIRD))],
    [MicroBatch((THIRD,)), MicroBatch((FIRST,)), MicroBatch((SECOND,))],
]


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_two_steps_do_not_depend_on_how_the_batch_is_split(split: int, score: str) -> None:
    run = run_config(score=score, loss_free=score == "sigmoid", bias_rate=0.1)
    whole, parts = trainer(run), trainer(run)
    for _ in range(2):
        expected, actual = whole.step(SPLITS[0]), parts.step(SPLITS[split])
        assert actual.loss == pytest.approx(expected.loss, rel=1e-13)
        assert difference(actual, expected) < 1e-14
        assert {k: v.tolist() for k, v in actual.count_E.items()} == {
            k: v.tolist() for k, v in expected.count_E.items()
        }


def test_the_micro_balance_loss_does_depend_on_it() -> None:
    run = run_config(balance_scope="micro")
    assert difference(trainer(run).step(SPLITS[1]), trainer(run).step(SPLITS[0])) > 1e-5


def test_the_loss_is_one_sum_over_one_count_not_a_mean_of_means() -> None:
    run = run_config(balance_coef=0.0, z_loss_coef=0.0)
    step = trainer(run).step(SPLITS[1])
    alone = [trainer(run).step([MicroBatch((d,))]) for d in (FIRST, SECOND)]
    assert (step.num_tokens, step.num_loss_tokens) == (15, 8)
    assert step.loss == pytest.approx((7 * alone[0].loss + 1 * alone[1].loss) / 8, rel=1e-13)
    assert abs(step.loss - (alone[0].loss + alone[1].loss) / 2) > 1e-2


def test_the_balance_loss_of_a_step_uses_the_counts_of_the_one_before() -> None:
    run = run_config(z_loss_coef=0.0, balance_coef=1.0)
    lagged = trainer(run)
    even = lagged.step(SPLITS[0])
    assert even.aux == pytest.approx(len(MODEL.moe_layers) * 1.0, rel=1e-12)  # f = 1 / E
    assert {k: v.tolist() for k, v in lagged.balance.lagged_count_E.items()} == {
        k: v.tolist() for k, v in even.count_E.items()
    }
    assert abs(lagged.step(SPLITS[0]).aux - 2.0) > 1e-3


def test_biases_move_by_the_sign_of_what_is_missing() -> None:
    run = run_config(score="sigmoid", loss_free=True, bias_rate=0.125)
    moving = trainer(run)
    counts = moving.step(SPLITS[0]).count_E[0]
    mean = float(counts.sum()) / 4
    expected = [0.125 * ((mean > c) - (mean < c)) for c in counts.tolist()]
    assert moving.balance.bias_E[0].tolist() == expected
    assert any(expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_whose_gradient_is_not_finite_changes_nothing_but_the_schedule(
    name: Literal["sgd", "adamw"],
) -> None:
    run = run_config(score="sigmoid", loss_free=True, bias_rate=0.125, balance_coef=0.1)
    run = replace(run, optim=replace(run.optim, name=name, warmup_steps=4))
    skipping, plain = trainer(run), trainer(run)
    for moving in (skipping, plain):
        moving.step(SPLITS[0])
    params, balance = skipping.params, skipping.balance
    skipping.params = {**params, "lm_head.weight": 1e200 * params["lm_head.weight"]}
    broken = skipping.params
    step = skipping.step(SPLITS[0])
    assert step.grad_norm == math.inf
    assert any(count.any() for count in step.count_E.values())
    assert skipping.params is broken
    assert skipping.balance is balance
    skipping.params, plain.optimizer.step_idx = params, 2
    expected, actual = plain.step(SPLITS[1]), skipping.step(SPLITS[1])
    assert actual.loss == expected.loss
    assert all(torch.equal(actual.params[key], value) for key, value in expected.params.items())
    assert {k: v.tolist() for k, v in skipping.balance.bias_E.items()} == {
        k: v.tolist() for k, v in plain.balance.bias_E.items()
    }


def test_a_plain_sgd_step_is_minus_the_rate_times_the_gradient() -> None:
    run = run_config()
    moving = trainer(run)
    before = moving.params
    step = moving.step(SPLITS[0])
    for name, value in before.items():
        torch.testing.assert_close(step.params[name], value - 0.5 * step.grads[name], rtol=0, atol=1e-15)


def test_a_step_in_the_direction_of_the_gradient_lowers_the_loss() -> None:
    run = run_config(steps=30)
    moving = trainer(run)
    losses = [moving.step(SPLITS[0]).loss for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_without_any_token_changes_nothing() -> None:
    moving = trainer(run_config())
    before = moving.params
    step = moving.step([EMPTY])
    assert (step.loss, step.grad_norm) == (0.0, 0.0)
    assert all(torch.equal(step.params[name], before[name]) for name in before)


def test_all_tokens_on_one_expert() -> None:
    run = run_config(top_k=1)
    one = trainer(run)
    for layer in MODEL.moe_layers:
        one.balance.bias_E[layer][2] = 10.0
    counts = one.step([MicroBatch((FIRST,))]).count_E
    assert counts[0].tolist() == [0, 0, 7, 0]
