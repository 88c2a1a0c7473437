"""Another schedule in the engine's place of the usual one: the same step."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_configs import layer_config
from ranks import run_on_ranks
from torch import Tensor
from train.tiny_run import do_step, make_engine, make_run

from moetrain.config import MeshConfig, OptimConfig
from moetrain.models.fsdp import set_gradient_sync
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.plan import SequencePlan
from moetrain.train.engine import Engine
from moetrain.train.schedule import StepSums, check_rounds, loss_of, random_key, run_forward

pytestmark = pytest.mark.dist


@dataclass
class AllForwardFirst:
    """Every round forward, then every round backward, newest first (GPipe's order); it may lose one round's."""

    engine: Engine
    lost: int | None = None

    def run(self, plan: SequencePlan, batches: Iterable[PackedBatch], step: int) -> StepSums:
        engine, sums = self.engine, StepSums.zero(self.engine.device)
        given = [batch.to(engine.device) for batch in batches]
        outputs = [
            run_forward(engine.model, batch, plan, random_key(engine.run, step, idx)) for idx, batch in enumerate(given)
        ]
        check_rounds(plan.num_rounds(engine.lane.rank), len(outputs))
        for idx in reversed(range(len(outputs))):
            set_gradient_sync(engine.model, idx == 0, engine.run.train.reshard_after_forward)
            loss_of(outputs[idx], plan).mul(0.0 if idx == self.lost else 1.0).backward()
            sums.add(outputs[idx], given[idx])
        return sums


def step_body(rank: int, corpus: Path, options: dict[str, Any], order: str) -> tuple[list[float], dict[str, Tensor]]:
    layer = layer_config(num_experts=6, top_k=2, expert_width=24, **options)
    run = make_run(
        corpus,
        corpus / "unused",
        mesh=MeshConfig(ep=2),
        layer=layer,
        optim=OptimConfig(name="sgd", lr=0.1, warmup_steps=0),
    )
    engine = make_engine(run, 2)
    if order != "usual":
        engine.schedule = AllForwardFirst(engine, lost=1 if order == "lost" else None)
    report = do_step(engine)
    return [report.loss, report.aux, report.grad_norm, report.max_vio], engine.whole.gradients()


@pytest.mark.parametrize("options", [{}, {"pieces": 2, "rounding": "stochastic", "tile": 4}], ids=str)
def test_the_order_of_rounds_changes_no_gradient(corpus: Path, options: dict[str, Any]) -> None:
    (usual, grads), _ = run_on_ranks(2, step_body, corpus, options, "usual")
    for numbers, others in run_on_ranks(2, step_body, corpus, options, "other"):
        assert numbers == pytest.approx(usual, rel=1e-5)
        largest = max(float(grad.abs().max()) for grad in grads.values())
        for name, grad in grads.items():
            scale = max(float(grad.abs().max()), 0.01 * largest)
            assert float((others[name] - grad).abs().max()) <= 1e-5 * scale, name


def test_a_round_without_backward_would_show(corpus: Path) -> None:
    (_, grads), _ = run_on_ranks(2, step_body, corpus, {}, "usual")
    (_, others), _ = run_on_ranks(2, step_body, corpus, {}, "lost")
    assert any(not torch.allclose(others[name], grad, rtol=1e-2) for name, grad in grads.items())
