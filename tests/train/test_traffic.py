"""What a step says that it sent: dense gradients against sizes worked out by hand, and everything afresh each step."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from train.tiny_run import do_step, make_engine, make_run

from moetrain.config import MeshConfig
from moetrain.data.dataset import PackedDataset
from moetrain.data.loader import RowLoader
from moetrain.sequence.data_planner import plan_data
from moetrain.sequence.plan import Sequence
from moetrain.train.evaluate import evaluate

pytestmark = pytest.mark.dist


Steps = list[dict[str, int]]


def two_steps(rank: int, corpus: Path, mesh: dict[str, Any]) -> tuple[Steps, dict[str, tuple[int, bool]]]:
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(**mesh), dtype="float32")
    engine = make_engine(run, dist.get_world_size())
    sizes = {shard.name: (math.prod(shard.shape), shard.cut is not None) for shard in engine.dense}
    return [do_step(engine).bytes_sent for _ in range(2)], sizes


@pytest.mark.parametrize(
    ("world", "mesh", "reduced"),
    [
        (1, {}, 0),
        (2, {"ep": 2}, 1),  # each half goes to its owner
        (2, {"dp_replicate": 2}, 2),  # a ring sends every byte of both ranks' gradients once
        (2, {"tp": 2}, 0),
        (4, {"tp": 2, "ep": 2, "etp": 2}, 1),
    ],
)
def test_dense_gradients_are_counted(world: int, mesh: dict[str, Any], reduced: int, corpus: Path) -> None:
    """``reduced``: how often data parallelism sends each element of a tp coordinate's gradients, over its ranks."""
    answers = run_on_ranks(world, two_steps, corpus, mesh)
    sizes = answers[0][1].values()
    tp = mesh.get("tp", 1)
    by_data = sum(size if is_cut else tp * size for size, is_cut in sizes)
    by_tp = sum(0 if is_cut else 2 * (tp - 1) * size for size, is_cut in sizes)
    assert sum(steps[0].get("dense_grad", 0) for steps, _ in answers) == 4 * (reduced * by_data + by_tp)


def test_every_step_counts_afresh(corpus: Path) -> None:
    for (first, second), _ in run_on_ranks(2, two_steps, corpus, {"ep": 2}):
        assert first["dense_grad"] == second["dense_grad"]
        assert {"dispatch", "combine", "dispatch_grad", "combine_grad", "pairs", "weights"} <= set(first)
        assert first["dispatch"] == first["combine_grad"] > 0
        assert first["combine"] == first["dispatch_grad"] > 0


def steps_around_evaluations(rank: int, corpus: Path) -> Steps:
    """Of a first step, of one after two evaluations, of one after a look at whole parameters, and of one more."""
    engine = make_engine(make_run(corpus, corpus / "unused", dtype="float32"), dist.get_world_size())
    data = engine.run.data
    loader = RowLoader(PackedDataset(data.path, "validation", data.seq_len, engine.run.seed))
    steps = [do_step(engine).bytes_sent]
    for _ in range(2):
        evaluate(engine, loader, 5)
    steps.append(do_step(engine).bytes_sent)
    engine.whole.parameters()
    return [*steps, do_step(engine).bytes_sent, do_step(engine).bytes_sent]


def one_report(rank: int, corpus: Path, mesh: dict[str, Any]) -> tuple[int, int, int, int]:
    engine = make_engine(make_run(corpus, corpus / "unused", mesh=MeshConfig(**mesh)), dist.get_world_size())
    report = do_step(engine)
    own = sum(report.bytes_sent.values()), sum(report.bytes_between_nodes.values())
    return (*own, report.bytes_sent_by_all, report.bytes_between_nodes_by_all)


def test_the_sum_over_ranks_is_on_every_rank(corpus: Path) -> None:
    """Of seven ranks one has no expert, so no rank is typical."""
    reports = run_on_ranks(7, one_report, corpus, {"ep": 7, "ranks_per_node": 4})
    own, between, by_all, between_by_all = zip(*reports, strict=True)
    assert set(by_all) == {sum(own)}
    assert set(between_by_all) == {sum(between)}
    assert 0 < sum(between) < sum(own)
    assert len(set(own)) > 1


def test_an_evaluation_is_told_apart_and_nothing_that_moved_is_forgotten(corpus: Path) -> None:
    """Half of all experts come from the other rank once per epoch, whoever is the first to need them."""
    for plain, after, inspected, last in run_on_ranks(2, steps_around_evaluations, corpus):
        assert plain["gather"] == plain["scatter"] > 0
        assert {name for name in after if name.startswith("evaluation_")} == {"evaluation_gather"}
        assert {**after, "gather": after["evaluation_gather"]} == {**plain, "evaluation_gather": plain["gather"]}
        assert inspected == {**plain, "inspect": plain["gather"]}
        assert last == plain


def test_two_levels_cross_nodes_less(corpus: Path) -> None:
    """Two nodes of two ranks, four experts for each token: it crosses at most once instead of twice."""
    crossing = {}
    for two_level in (False, True):
        mesh = {"ep": 4, "ranks_per_node": 2, "two_level": two_level}
        answers = run_on_ranks(4, steps_between_nodes, corpus, mesh)
        crossing[two_level] = [sum(one[name] for one in answers) for name in ("dispatch", "combine_grad")]
    assert crossing[True][0] == crossing[True][1]
    assert crossing[False][0] == crossing[False][1]
    assert 0.4 * crossing[False][0] < crossing[True][0] < crossing[False][0]


def test_what_the_configuration_says_of_dispatch_reaches_it(corpus: Path) -> None:
    """Padded messages depend on nothing but sizes; counts are exchanged only where nothing bounds them."""
    counts = []
    for pieces in (1, 2):
        plain, padded = (
            run_on_ranks(2, steps_of, corpus, {"pieces": pieces, **options})
            for options in ({}, {"capacity_factor": 0.75, "pad_to_capacity": True})
        )
        counts.append({step["counts"] for steps in plain for step in steps})
        for step in (step for steps in padded for step in steps):
            assert "counts" not in step
            assert step["dispatch"] == step["combine"] == step["dispatch_grad"] == step["combine_grad"] > 0
            assert {name: size for name, size in step.items() if name != "dense_grad"} == {
                name: size for name, size in padded[0][0].items() if name != "dense_grad"
            }
    (one,), (two,) = counts
    assert two == 2 * one > 0


def steps_of(rank: int, corpus: Path, dispatch: dict[str, float]) -> list[dict[str, int]]:
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(ep=2), dtype="float32")
    run = replace(run, dispatch=replace(run.dispatch, **dispatch))  # type: ignore[arg-type]
    engine = make_engine(run, dist.get_world_size())
    return [do_step(engine).bytes_sent for _ in range(2)]


def steps_between_nodes(rank: int, corpus: Path, mesh: dict[str, Any]) -> dict[str, int]:
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(**mesh), dtype="float32")
    return do_step(make_engine(run, dist.get_world_size())).bytes_between_nodes


def test_expert_gradients_are_counted(corpus: Path) -> None:
    """Two holders of every expert, half of each owned here: each sends the other's half."""
    for (first, second), _ in run_on_ranks(2, two_steps, corpus, {"ep": 1}):
        experts = 6 * 3 * 24 * 32
        assert first["scatter"] == second["scatter"] == 4 * experts // 2
        assert first["gather"] == second["gather"] == 4 * experts // 2


def too_large(rank: int, corpus: Path) -> str:
    run = make_run(corpus, corpus / "unused", mesh=MeshConfig(ep=2), dtype="float32")
    engine = make_engine(replace(run, dispatch=replace(run.dispatch, capacity_factor=1.0, pad_to_capacity=True)), 2)
    plan = plan_data([Sequence(row, 32, 32) for row in range(5)], 2, 3)
    try:
        engine.step(plan, [])
    except ValueError as error:
        return str(error)
    return "no error"


def test_micro_batches_that_padded_messages_cannot_hold_are_refused_on_every_rank(corpus: Path) -> None:
    for text in run_on_ranks(2, too_large, corpus):
        assert "micro-batches of 64 tokens, but the plan may have one of 96; raise data.micro_batch" in text
