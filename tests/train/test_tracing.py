"""A run that keeps a trace: what was routed, once, whatever ends the run and whoever plans meanwhile."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from train.tiny_run import do_step, make_engine, make_run, used_folder

from moetrain.config import MeshConfig, PlacementConfig, RunConfig
from moetrain.placement.loads import ExpertLoads
from moetrain.placement.trace import Trace, TraceFacts, piece_path, pieces
from moetrain.train import tracing
from moetrain.train.loop import train
from moetrain.train.metrics import MetricsLog
from moetrain.train.own_files import strangers
from moetrain.train.run_folder import RunFolder
from moetrain.train.tracing import LoadRecorder, LoadTracing, truncate_trace

PAIRS = 6 * 32 * 2  # of a step of the tiny run: rows, tokens, top-k


def traced(run: RunConfig, **placement: Any) -> RunConfig:
    return replace(run, placement=PlacementConfig(trace=True, **placement))


def row(step: int) -> torch.Tensor:
    """[layer 1, sources 2, experts 3]"""
    return torch.arange(6, dtype=torch.int32).view(1, 2, 3) + 10 * step


def steps_of(folder: Path) -> list[int]:
    trace = Trace.load(folder)
    for index, step in enumerate(range(trace.first_step, trace.last_step + 1)):
        assert np.array_equal(trace.count[index], row(step).numpy())
    return list(range(trace.first_step, trace.last_step + 1))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tracing, "PIECE_STEPS", 4)
    return tmp_path / "trace"


def recorded(folder: Path, first: int, last: int, *, flush: bool = True) -> None:
    recorder = LoadRecorder(folder, (1,), TraceFacts())
    for step in range(first, last + 1):
        recorder.append(step, row(step))
    if flush:
        recorder.flush()


def test_full_pieces_are_written_at_once_and_the_rest_when_asked(folder: Path) -> None:
    recorded(folder, 1, 10, flush=False)
    assert steps_of(folder) == [*range(1, 9)]
    recorded(folder, 9, 10)
    assert steps_of(folder) == [*range(1, 11)]
    assert [path.name for path in pieces(folder)] == [piece_path(folder, first).name for first in (1, 5, 9)]


@pytest.mark.parametrize("step", [0, 1, 4, 6, 8, 10, 12])
def test_a_resumed_run_goes_on_where_it_resumes(step: int, folder: Path) -> None:
    recorded(folder, 1, 10)
    truncate_trace(folder, step)
    if step == 0:
        assert pieces(folder) == []
    else:
        assert steps_of(folder) == [*range(1, min(step, 10) + 1)]
    if step <= 10:
        recorded(folder, step + 1, 13)
        assert steps_of(folder) == [*range(1, 14)]


def test_a_piece_that_a_power_cut_emptied_is_dropped_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded(folder, 1, 10)
    piece_path(folder, 9).write_bytes(b"")
    assert strangers(folder.parent) == []
    truncate_trace(folder, 8)
    assert "loads-00000009.npz: a damaged piece of the trace was removed" in caplog.text
    assert steps_of(folder) == [*range(1, 9)]
    piece_path(folder, 9).write_bytes(b"mine")
    assert strangers(folder.parent) == ["trace/loads-00000009.npz"]


def test_a_step_has_all_rounds_whoever_took_some() -> None:
    loads = ExpertLoads([1], 2)
    for offsets in ([0, 1, 3], [0, 4, 4]):
        loads.add(1, torch.tensor(offsets))
        assert loads.take().tolist() == [[offsets[1], offsets[2] - offsets[1]]]
    loads.add(1, torch.tensor([0, 10, 30]))
    assert loads.take_step().tolist() == [[15, 22]]
    loads.add(1, torch.tensor([0, 1, 1]))
    assert loads.take_step().tolist() == [[1, 0]]


def gathered(rank: int, corpus: Path, folder: Path, mesh: dict[str, Any], placement: dict[str, Any]) -> None:
    run = traced(make_run(corpus, folder / "unused", mesh=MeshConfig(**mesh)), **placement)
    engine = make_engine(run, dist.get_world_size())
    assert engine.loads is not None
    tracing = LoadTracing(engine, engine.loads, folder)
    for step in range(3):
        do_step(engine)
        tracing.record(step + 1)
    tracing.flush()
    dist.barrier()


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {}, {}),
    (2, {"ep": 2, "ranks_per_node": 2}, {"planner": "moetrain", "slots": 1, "plan_every": "micro_batch"}),
    (2, {"etp": 2}, {}),
    (4, {"ep": 2, "ranks_per_node": 2}, {"planner": "full"}),
]


@pytest.mark.dist
def test_each_source_has_its_own_tokens_and_together_they_have_all(corpus: Path, tmp_path: Path) -> None:
    """Loads are what tokens choose: no planner and no mesh changes their sum over sources."""
    found = []
    for index, (ranks, mesh, placement) in enumerate(CASES):
        (tmp_path / str(index)).mkdir()
        run_on_ranks(ranks, gathered, corpus, tmp_path / str(index), mesh, placement)
        found.append(Trace.load(tmp_path / str(index)))
    assert [trace.count.shape for trace in found] == [(3, 1, sources, 6) for sources in (1, 2, 1, 4)]
    assert [trace.facts.groups_per_node for trace in found] == [1, 2, 1, 2]
    assert [trace.facts.planner for trace in found] == ["static", "moetrain", "static", "full"]
    for trace in found:
        assert (trace.layers, trace.first_step, trace.facts.top_k) == ((1,), 1, 2)
        assert (trace.count[0].sum(axis=(0, 1, 2)), trace.count.min() >= 0) == (PAIRS, True)
        assert np.array_equal(trace.count[0].sum(axis=1), found[0].count[0].sum(axis=1)), "the first step's weights"
    halves = found[1].count[0, 0].sum(axis=1)
    assert halves.tolist() == [PAIRS // 2, PAIRS // 2], "each rank has half of the rows"


class PowerCutError(Exception):
    """Nothing of what was in memory is left."""


@pytest.mark.dist
def test_a_run_that_is_cut_off_and_goes_on_leaves_the_same_trace(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = traced(make_run(corpus, tmp_path / "run", steps=6))
    train(run)
    whole = Trace.load(run.run_dir)
    assert (whole.first_step, whole.last_step) == (1, 6)
    assert whole.count.sum(axis=(1, 2, 3)).tolist() == [PAIRS] * 6

    def cut(log: MetricsLog, record: Mapping[str, Any]) -> None:
        if record["step"] == 6:
            raise PowerCutError
        append(log, record)

    append, again = MetricsLog.append, replace(run, run_dir=tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", cut)
        with pytest.raises(PowerCutError):
            train(again)
    assert Trace.load(again.run_dir).last_step == 4, "the newest checkpoint's"
    train(again)
    assert np.array_equal(Trace.load(again.run_dir).count, whole.count)


def test_a_trace_is_removed_and_set_aside_with_its_run_and_nothing_else_is(folder: Path, tmp_path: Path) -> None:
    run = traced(make_run(tmp_path / "corpus", tmp_path, steps=6))
    used_folder(run)
    recorded(folder, 1, 6)
    (folder / "notes.txt").write_text("mine")
    aside = RunFolder(tmp_path).set_aside()
    assert aside is not None
    assert steps_of(aside) == [*range(1, 7)]
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt"]
    recorded(folder, 1, 6)
    RunFolder(tmp_path).make(replace(run, train=replace(run.train, overwrite=True)))
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt"]


def test_a_file_in_the_way_is_refused_and_stays(tmp_path: Path) -> None:
    run = traced(make_run(tmp_path / "corpus", tmp_path / "run"))
    mine = piece_path(run.run_dir / "trace", 1)
    mine.parent.mkdir(parents=True)
    np.savez(mine, count=np.ones((1, 1, 1, 1), dtype=np.int32))
    before = mine.read_bytes()
    with pytest.raises(ValueError, match=r"holds trace/loads-00000001.npz that no run has written .*; rename it"):
        RunFolder(run.run_dir).check(run)
    assert mine.read_bytes() == before
    mine.unlink()
    mine.parent.rmdir()
    mine.parent.write_text("mine")
    with pytest.raises(ValueError, match=r"must have a folder for placement.trace, but .*trace is a file; rename it"):
        RunFolder(run.run_dir).check(run)
    RunFolder(run.run_dir).check(replace(run, placement=PlacementConfig()))
