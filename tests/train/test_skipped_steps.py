"""A step whose gradient is not finite: nothing that later steps learn from may change, on any rank."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layer_configs import layer_config
from ranks import run_on_ranks
from torch import Tensor
from train.tiny_run import do_step, make_engine, make_run

from moetrain.checkpoint.folder import find_latest
from moetrain.config import MeshConfig, OptimConfig, RunConfig
from moetrain.oracle import OracleTrainer
from moetrain.sequence import pack_item, plan_data
from moetrain.train.engine import Engine, StepReport
from moetrain.train.optimizer import num_updates
from moetrain.train.state import load_engine, save_engine
from moetrain.verify.batches import Rows, make_rows, oracle_batches, table_of_rows

SEQ_LEN = 16
LAYER = layer_config(num_experts=6, top_k=2, expert_width=24, score="sigmoid", loss_free=True, bias_rate=0.125)


def run_of(corpus: Path, mesh: dict[str, Any], **options: Any) -> RunConfig:
    return make_run(corpus, corpus / "unused", steps=20, mesh=MeshConfig(**mesh), layer=LAYER, **options)


def learnt_from(engine: Engine) -> dict[str, Tensor]:
    """What a later step depends on: parameters, and what balancing remembers."""
    balance = engine.balance.state_dict()
    return engine.whole.parameters() | {
        f"{name} {layer}": kept for layer in balance for name, kept in balance[layer].items()
    }


def changed(before: dict[str, Tensor], engine: Engine) -> list[str]:
    return [name for name, value in learnt_from(engine).items() if not torch.equal(value, before[name])]


def skip_on_ranks(rank: int, corpus: Path, folder: Path, mesh: dict[str, Any]) -> tuple[list[float], float]:
    """Step, step with rank 1's gradient infinite, save, step; and once more the last one from the checkpoint."""
    engine = make_engine(run_of(corpus, mesh), dist.get_world_size())
    spoilt = {"now": False}

    def spoil(parameter: Tensor) -> None:
        if spoilt["now"] and rank == 1 and parameter.grad is not None:
            parameter.grad.fill_(math.inf)

    dict(engine.model.named_parameters())["final_norm.weight"].register_post_accumulate_grad_hook(spoil)
    do_step(engine)
    before, updates = learnt_from(engine), num_updates(engine.optimizer)
    assert before["bias_E 1"].any()
    spoilt["now"] = True
    report = do_step(engine)
    assert report.skipped
    assert report.max_vio > 0, "loads are reported all the same"
    assert changed(before, engine) == []
    assert num_updates(engine.optimizer) == updates
    save_engine(engine, folder, dist.group.WORLD)
    spoilt["now"] = False
    resumed = make_engine(run_of(corpus, mesh), dist.get_world_size())
    path = find_latest(folder, dist.group.WORLD)
    assert path is not None
    load_engine(resumed, path, dist.group.WORLD)
    assert changed(before, resumed) == []
    losses = [do_step(each).loss for each in (engine, resumed)]
    assert not {"bias_E 1", "lagged_count_E 1"} - set(changed(before, engine)), "the next step moves them"
    after = learnt_from(engine)
    assert changed(after, resumed) == []
    return losses, float(after["bias_E 1"].abs().sum())


@pytest.mark.dist
@pytest.mark.parametrize("mesh", [{"ep": 2}, {"tp": 2, "etp": 2}], ids=str)
def test_a_skipped_step_changes_nothing_on_any_rank_and_in_no_checkpoint(
    mesh: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    first, second = run_on_ranks(2, skip_on_ranks, corpus, tmp_path, mesh)
    assert first == second
    assert first[0][0] == first[0][1]


def steps_beside_the_oracle(rank: int, corpus: Path) -> None:
    """Three steps, the second with an output layer so large that the norm overflows, in both."""
    optim = OptimConfig(name="adamw", lr=0.01, warmup_steps=4, eps=1e-3)
    run = run_of(corpus, {}, dtype="float64", optim=optim)
    engine = make_engine(run, 1)
    oracle = OracleTrainer(engine.whole.parameters(), run)
    for step in range(3):
        good = oracle.params
        if step == 1:
            oracle.params = {**good, "lm_head.weight": 1e200 * good["lm_head.weight"]}
        engine.whole.load(oracle.params)
        rows = make_rows(3, step, 6, seq_len=SEQ_LEN, vocab_size=run.model.vocab_size)
        plan, by_id = plan_data(table_of_rows(rows), 1, 2), Rows(rows)
        rounds = range(plan.num_rounds(0))
        report: StepReport = engine.step(plan, [pack_item(plan, plan.item_at(0, i), 0, by_id) for i in rounds])
        expected = oracle.step(oracle_batches(plan, by_id))
        assert report.skipped == (step == 1) == (not math.isfinite(expected.grad_norm))
        for layer, kept in engine.balance.state_dict().items():
            assert kept["bias_E"].tolist() == oracle.balance.bias_E[layer].tolist(), step
            assert kept["lagged_count_E"].tolist() == oracle.balance.lagged_count_E[layer].tolist(), step
        for name, value in engine.whole.parameters().items():
            torch.testing.assert_close(value, oracle.params[name], rtol=1e-10, atol=1e-12, msg=f"step {step}: {name}")
        if step == 1:
            oracle.params = good


@pytest.mark.dist
def test_the_oracle_skips_the_same_step_and_goes_on_alike(corpus: Path) -> None:
    run_on_ranks(1, steps_beside_the_oracle, corpus)
