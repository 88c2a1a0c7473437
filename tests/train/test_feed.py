"""Plans and batches made beside the steps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from train.tiny_run import losses, make_run, of_steps

from moetrain.checkpoint import list_checkpoints
from moetrain.config import DataConfig, MeshConfig, RunConfig, SequenceConfig, StartConfig
from moetrain.data.dataset import PackedDataset
from moetrain.data.documents import DocumentDataset
from moetrain.data.loader import DocumentLoader, RowLoader
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.sequence import SequencePlan, StepPlanner
from moetrain.sequence.plan import Ints
from moetrain.sequence.planner import lanes_of_block
from moetrain.train.engine import Engine
from moetrain.train.feed import PlansDifferError, StepFeed
from moetrain.train.loop import train
from moetrain.train.preflight import preflight
from moetrain.train.world import RefusedByAllError


def documents_run(corpus: Path, run_dir: Path, planner: str = "moetrain", **options: Any) -> RunConfig:
    """Documents of up to 60 tokens on ranks that hold 40."""
    data = DataConfig(path=corpus, packing="documents", context=60, batch_tokens=800)
    sequence = SequenceConfig(planner=planner, capacity=60 if planner == "data" else 40)  # type: ignore[arg-type]
    return make_run(corpus, run_dir, **{"data": data, "sequence": sequence, **options})


def feed_of(run: RunConfig, spoil: Callable[[StepFeed], None] | None = None) -> StepFeed:
    mesh = FoldedMesh.of_run(run, dist.get_world_size())
    groups = MeshGroups.create(mesh, gangs=True)
    data = run.data
    loader = DocumentLoader(DocumentDataset(data.path, "train", data.context, run.seed))
    planner = StepPlanner.of(run, mesh)
    feed = StepFeed(loader, planner, groups, groups.group("world"), batch_size=data.batch_tokens)
    if spoil is not None:
        spoil(feed)
    return feed


def steps_body(rank: int, corpus: Path) -> tuple[list[str], list[int], list[int]]:
    """Hashes of three plans, tokens of this rank, and the places that were planned here."""
    run = documents_run(corpus, corpus / "unused")
    planned: list[int] = []
    feed = feed_of(run)
    whole = feed.loader.table

    def table(first: int, count: int) -> Ints:
        planned.append(first)
        return whole(first, count)

    feed.loader.table = table  # type: ignore[method-assign]
    hashes, tokens = [], []
    try:
        for step, place in enumerate((0, 800, 2400)):
            plan, batches = feed.next(place, step, last=step == 2)
            hashes.append(plan.content_hash())
            found = list(batches)
            assert len(found) == plan.num_rounds(rank)
            tokens.append(sum(batch.num_tokens for batch in found))
            assert tokens[-1] == plan.num_tokens_of_ranks()[rank]
    finally:
        feed.close()
    return hashes, tokens, planned


@pytest.mark.dist
def test_all_ranks_have_the_first_ones_plan_a_step_ahead(corpus: Path) -> None:
    found = run_on_ranks(3, steps_body, corpus)
    assert found[0][0] == found[1][0] == found[2][0]
    assert len(set(found[0][0])) == 3
    # The plan of place 1600 was made ahead, for nothing: the run went on at another place.
    assert [of_rank[2] for of_rank in found] == [[0, 800, 1600, 2400], [], []]
    loader = DocumentLoader(DocumentDataset(corpus, "train", 60, 1234))
    sums = [sum(tokens) for tokens in zip(*(of_rank[1] for of_rank in found), strict=True)]
    assert sums == [int(loader.table(place, 800)[:, 1].sum()) for place in (0, 800, 2400)]


def told_body(rank: int, corpus: Path, mistake: str) -> str:
    """What a rank is told where the first one cannot plan, or the last one has another plan."""

    def spoil(feed: StepFeed) -> None:
        def broken(first: int, count: int) -> Ints:
            raise ValueError(f"no table of {first}")

        def other(plan: SequencePlan) -> bytes:
            return bytes(32)

        if mistake == "table":
            feed.loader.table = broken  # type: ignore[method-assign]
        elif rank == 1:
            feed.digest_of = other  # type: ignore[method-assign]

    feed = feed_of(documents_run(corpus, corpus / "unused"), spoil)
    try:
        with pytest.raises((RefusedByAllError, PlansDifferError)) as told:
            feed.next(0, 7)
    finally:
        feed.close()
    return f"{type(told.value).__name__}: {told.value}"


@pytest.mark.dist
def test_mistakes_are_told_to_all(corpus: Path) -> None:
    told = run_on_ranks(2, told_body, corpus, "table")
    assert told == ["RefusedByAllError: step 7 cannot be planned: no table of 0"] * 2
    told = run_on_ranks(2, told_body, corpus, "hash")
    assert told[0] == told[1]
    assert told[0].startswith(
        "PlansDifferError: step 7: all ranks must have one plan of sequences, but rank 1 has 0000"
    )


@pytest.mark.parametrize("planner", ["data", "moetrain"])
def test_documents_train_and_resume_to_the_bit(corpus: Path, tmp_path: Path, planner: str) -> None:
    one_rank = SequenceConfig(planner=planner, capacity=64)  # type: ignore[arg-type]
    run = documents_run(corpus, tmp_path / "run", steps=6, sequence=one_rank)
    summary = train(run)
    expected, first = losses(run.run_dir), of_steps(run.run_dir, "seconds")
    assert summary["validation_rows"] > 0
    assert expected[6] < expected[1]
    newest = list_checkpoints(run.run_dir / "checkpoints")[-1]
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    (run.run_dir / "summary.json").unlink()
    train(run)
    assert losses(run.run_dir) == expected
    assert [step for step, taken in of_steps(run.run_dir, "seconds").items() if taken != first[step]] == [5, 6]


def ring_bytes(plan: SequencePlan, run: RunConfig) -> int:
    """What a plan's gangs send in a step: keys and values of each token to all others of its gang, forward and back.

    And their gradients, once.
    """
    tokens = sum(
        (len(item.ranks) - 1) * sum(sequence.num_tokens for sequence in plan.sequences_of(item))
        for item in plan.all_items()
    )
    return 3 * tokens * run.model.num_layers * 2 * run.model.num_kv_heads * run.model.head_dim * 4


def train_body(rank: int, corpus: Path, run_dir: Path, planner: str, mesh: MeshConfig) -> dict[int, float]:
    run = documents_run(corpus, run_dir / f"{rank}", planner, steps=3, mesh=mesh)
    engine_losses: dict[int, float] = {}
    mesh_of = FoldedMesh.of_run(run, dist.get_world_size())
    engine = Engine(run, MeshGroups.create(mesh_of, gangs=run.sequence.has_gangs), "cpu")
    loader = DocumentLoader(DocumentDataset(corpus, "train", 60, run.seed))
    feed = StepFeed(loader, StepPlanner.of(run, mesh_of), engine.groups, engine.groups.group("world"), batch_size=800)
    try:
        for step in range(3):
            plan, batches = feed.next(800 * step, step, last=step == 2)
            report = engine.step(plan, batches)
            engine_losses[step] = report.loss
            sent = torch.tensor(report.bytes_sent.get("ring", 0))
            dist.all_reduce(sent)
            assert int(sent) == ring_bytes(plan, run)
    finally:
        feed.close()
    return engine_losses


@pytest.mark.dist
def test_what_is_learnt_does_not_depend_on_planner_or_ranks(corpus: Path, tmp_path: Path) -> None:
    alone = run_on_ranks(1, train_body, corpus, tmp_path, "data", MeshConfig())[0]
    ways = [
        (3, "moetrain", MeshConfig(ep=3)),
        (2, "bytescale", MeshConfig()),
        (4, "context", MeshConfig(cp=2, ep=2)),
    ]
    for ranks, planner, mesh in ways:
        for found in run_on_ranks(ranks, train_body, corpus, tmp_path, planner, mesh):
            assert found == pytest.approx(alone, rel=1e-5)


def rows_body(rank: int, corpus: Path, run_dir: Path, planner: str) -> list[float]:
    """Losses of packed rows, which documents end within."""
    sequence = SequenceConfig(planner=planner, capacity=None if planner == "data" else 20)  # type: ignore[arg-type]
    run = make_run(corpus, run_dir / f"{planner}{rank}", sequence=sequence)
    mesh = FoldedMesh.of_run(run, dist.get_world_size())
    engine = Engine(run, MeshGroups.create(mesh, gangs=run.sequence.has_gangs), "cpu")
    loader = RowLoader(PackedDataset(corpus, "train", run.data.seq_len, run.seed))
    feed = StepFeed(loader, StepPlanner.of(run, mesh), engine.groups, engine.groups.group("world"), batch_size=6)
    found = []
    try:
        for step in range(3):
            plan, batches = feed.next(6 * step, step, last=step == 2)
            assert planner == "data" or any(len(item.ranks) > 1 for item in plan.all_items())
            found.append(engine.step(plan, batches).loss)
    finally:
        feed.close()
    return found


@pytest.mark.dist
def test_packed_rows_may_be_shared_too(corpus: Path, tmp_path: Path) -> None:
    alone = run_on_ranks(1, rows_body, corpus, tmp_path, "data")[0]
    for planner in ("moetrain", "bytescale"):
        for found in run_on_ranks(3, rows_body, corpus, tmp_path, planner):
            assert found == pytest.approx(alone, rel=1e-5)


def test_a_step_without_a_document_is_told_and_changes_no_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of 500 places and a document of 2,000 tokens in six."""
    corpus, text = tmp_path / "corpus", tmp_path / "text"
    text.mkdir()
    for idx in range(40):
        (text / f"{idx:02d}").write_text(f"{idx} comes home again " * (5 if idx % 6 else 100))
    prepare([Source(name="words", path=text)], corpus, validation_fraction=0.2)
    data = DataConfig(path=corpus, packing="documents", context=60, batch_tokens=500)
    run = documents_run(corpus, tmp_path / "run", "data", data=data, steps=12)
    tables = DocumentDataset(corpus, "train", 60, run.seed)
    empty = [step for step in range(1, 13) if len(tables.table(500 * (step - 1), 500)) == 0]
    assert 0 < len(empty) < 12
    summary = train(run)
    told = [line for line in capsys.readouterr().out.splitlines() if "no document begins in its 500 places" in line]
    assert [line.split(":")[0] for line in told] == [f"step {step}" for step in empty]
    found = losses(run.run_dir)
    assert [step for step, loss in found.items() if loss == 0.0] == empty
    assert summary["train_loss"] == pytest.approx(sum(found.values()) / (12 - len(empty)))


def test_steps_that_would_mostly_be_empty_are_refused(corpus: Path, tmp_path: Path) -> None:
    data = DataConfig(path=corpus, packing="documents", context=60, batch_tokens=200)
    with pytest.raises(ValueError, match=r"data.batch_tokens \(200\) must have at least one .* set it to 668 or"):
        preflight(documents_run(corpus, tmp_path / "run", "data", data=data), 1)


def test_rows_go_on_as_documents_where_they_were(corpus: Path, tmp_path: Path) -> None:
    """Four steps of six rows of 32 tokens are 768 places."""
    train(make_run(corpus, tmp_path / "rows", steps=4))
    run = documents_run(corpus, tmp_path / "documents", "data", steps=5)
    run = replace(run, start=StartConfig(checkpoint=tmp_path / "rows"))
    train(run)
    table_N3 = DocumentDataset(corpus, "train", 60, run.seed).table(768, 800)
    records = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(record["step"], record["num_tokens"]) for record in records if "loss" in record]
    assert found == [(5, table_N3[:, 1].sum())]


@pytest.mark.parametrize(
    ("axes", "lanes"),
    [
        ({"dp_shard": 4, "ep": 4}, 4),
        ({"dp_shard": 4, "edp": 4}, 1),
        ({"dp_shard": 4, "tp": 2, "edp": 4, "ep": 2}, 1),
        ({"dp_shard": 4, "tp": 2, "edp": 2, "ep": 2, "etp": 2}, 2),
        ({"dp_shard": 3, "tp": 2, "edp": 2, "ep": 3}, 3),  # the middle lane is in both groups
        ({"dp_shard": 2, "cp": 2, "tp": 4, "edp": 8, "ep": 2}, 1),
    ],
)
def test_blocks_are_the_lanes_that_dispatch_joins(axes: dict[str, Any], lanes: int) -> None:
    mesh = FoldedMesh(**axes)
    assert lanes_of_block(mesh) == lanes
    sets: list[set[int]] = [{rank // mesh.tp for rank in group} for group in mesh.all_groups("dispatch")]
    for _ in sets:
        for one in sets:
            for other in sets:
                if one & other:
                    one |= other
    num_lanes = mesh.size("data")
    assert sorted({tuple(sorted(one)) for one in sets}) == [
        tuple(range(first, first + lanes)) for first in range(0, num_lanes, lanes)
    ]
