"""Measured costs of sequences: that measuring changes nothing, and that a run keeps those that it began with."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from train.tiny_run import do_step, losses, make_run, of_steps

from moetrain.checkpoint import Manifest as CheckpointManifest
from moetrain.checkpoint import list_checkpoints
from moetrain.cli.main import main
from moetrain.config import DataConfig, MeshConfig, PlacementConfig, RunConfig, SequenceConfig
from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES, PassCosts, SequenceCosts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.train import measure_sequences as measuring
from moetrain.train.engine import Engine
from moetrain.train.loop import train
from moetrain.train.measure_sequences import measure_sequences
from moetrain.train.preflight import preflight
from moetrain.train.sequence_profile import KEY, SequenceProfile, profiled


def weighing(corpus: Path, run_dir: Path, costs: str = "measured", **options: Any) -> RunConfig:
    data = DataConfig(path=corpus, packing="documents", context=60, batch_tokens=800)
    sequence = SequenceConfig(planner="moetrain", capacity=64, costs=costs)
    return make_run(corpus, run_dir, **{"data": data, "sequence": sequence, **options})


def engine_body(
    rank: int, corpus: Path, options: dict[str, Any], spoil: str
) -> tuple[SequenceProfile | None, list[float], list[torch.Tensor]]:
    """Two steps, behind a measurement or not; what was found, losses and parameters."""
    run = make_run(corpus, corpus / "unused", sequence=SequenceConfig(planner="moetrain"), **options)
    if options.get("layer") is None and run.mesh.ep == 2:
        run = replace(run, placement=PlacementConfig(planner="moetrain", calibrate=True))
    engine = Engine(run, MeshGroups.create(FoldedMesh.of_run(run, 2), gangs=True), "cpu")
    profile = None
    if spoil != "nothing measured":
        with pytest.MonkeyPatch.context() as patch:
            if spoil == "gradients stay":
                patch.setattr(Engine, "zero_grad", lambda self: None)
            if spoil == "counts stay":
                patch.setattr(type(engine.balance), "forget_step", lambda self: None)
            profile = measure_sequences(engine)
    if spoil == "gradients stay":
        with pytest.MonkeyPatch.context() as patch:  # those of the first step are what would be cleared
            patch.setattr(Engine, "zero_grad", lambda self: None)
            found = [do_step(engine).loss]
    else:
        found = [do_step(engine).loss]
    found.append(do_step(engine).loss)
    engine.placing.close()
    return profile, found, [shard.local().clone() for shard in engine.shards]


@pytest.mark.dist
@pytest.mark.parametrize(
    "options",
    [
        {"mesh": MeshConfig(ep=2)},
        {"mesh": MeshConfig(ep=2), "reshard_after_forward": False, "activation_checkpoint": True},
        {"mesh": MeshConfig(tp=2, etp=2)},
    ],
)
def test_measuring_leaves_nothing_behind(corpus: Path, options: dict[str, Any]) -> None:
    expected = run_on_ranks(2, engine_body, corpus, options, "nothing measured")
    found = run_on_ranks(2, engine_body, corpus, options, "")
    assert found[0][0] == found[1][0]
    assert found[0][0] is not None
    costs = found[0][0].costs
    lanes = 1 if "tp" in str(options) and options["mesh"].tp == 2 else 2
    for one in (costs.forward, costs.backward):
        assert one.square_ms * 64**2 + one.token_ms * 64 + one.item_ms > 0
        assert (one.hop_ms + one.hop_token_ms > 0) == (lanes > 1)
    for (_, losses_before, before), (_, losses_behind, behind) in zip(expected, found, strict=True):
        assert losses_behind == losses_before
        assert all(torch.equal(a, b) for a, b in zip(before, behind, strict=True))


@pytest.mark.dist
@pytest.mark.parametrize("spoil", ["gradients stay", "counts stay"])
def test_what_stays_would_show(corpus: Path, spoil: str) -> None:
    options = {"mesh": MeshConfig(ep=2)}
    expected = run_on_ranks(2, engine_body, corpus, options, "nothing measured")
    found = run_on_ranks(2, engine_body, corpus, options, spoil)
    same = [torch.equal(a, b) for a, b in zip(expected[0][2], found[0][2], strict=True)]
    assert not all(same)


def numbered(seen: list[SequenceProfile]) -> Callable[[Engine], SequenceProfile]:
    """Measures other costs each time."""

    def measured(engine: Engine) -> SequenceProfile:
        passes = PassCosts(square_ms=1e-4 * (1 + len(seen)), token_ms=1e-2, item_ms=float(1 + len(seen)))
        of = profiled(engine.run, engine.groups.mesh)
        seen.append(SequenceProfile(of, SequenceCosts(passes, passes), 0.0))
        return seen[-1]

    return measured


def test_a_run_plans_by_what_it_began_with(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first checkpoint its folder keeps that, afterwards the checkpoint."""
    seen: list[SequenceProfile] = []
    monkeypatch.setattr(measuring, "measure_sequences", numbered(seen))
    run = weighing(corpus, tmp_path / "run", steps=4)
    train(run)
    assert len(seen) == 1
    expected, planned = losses(run.run_dir), of_steps(run.run_dir, "planned_ms")
    newest = list_checkpoints(run.run_dir / "checkpoints")[-1]
    assert CheckpointManifest.read(newest).extra[KEY] == seen[0].to_json()
    assert SequenceProfile.read(run.run_dir / "profile.json") == seen[0]

    shutil.rmtree(newest)
    (run.run_dir / "summary.json").unlink()
    (run.run_dir / "profile.json").unlink()
    train(run)
    assert (len(seen), losses(run.run_dir), of_steps(run.run_dir, "planned_ms")) == (1, expected, planned)
    assert SequenceProfile.read(run.run_dir / "profile.json") == seen[0]

    for path in list_checkpoints(run.run_dir / "checkpoints"):
        shutil.rmtree(path)
    (run.run_dir / "summary.json").unlink()
    train(run)
    assert (len(seen), losses(run.run_dir)) == (1, expected)

    train(replace(run, train=replace(run.train, overwrite=True)))
    assert len(seen) == 2
    assert of_steps(run.run_dir, "planned_ms") != planned


def test_costs_of_another_run_may_be_given(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SequenceProfile] = []
    monkeypatch.setattr(measuring, "measure_sequences", numbered(seen))
    train(weighing(corpus, tmp_path / "first", steps=2))
    given = str(tmp_path / "first" / "profile.json")
    run = weighing(corpus, tmp_path / "second", given, steps=2)
    train(run)
    assert len(seen) == 1
    assert of_steps(run.run_dir, "planned_ms") == of_steps(tmp_path / "first", "planned_ms")
    modelled = weighing(corpus, tmp_path / "third", "modelled", steps=2)
    train(modelled)
    assert of_steps(modelled.run_dir, "planned_ms") != of_steps(run.run_dir, "planned_ms")
    assert not (modelled.run_dir / "profile.json").exists()


def test_costs_of_another_model_are_refused(corpus: Path, tmp_path: Path) -> None:
    of = weighing(corpus, tmp_path / "run")
    mesh = FoldedMesh.of_run(of, 1)
    path = tmp_path / "profile.json"
    path.write_text(SequenceProfile(profiled(of, mesh), UNMEASURED_SEQUENCES, 0.0).text())
    run = weighing(corpus, tmp_path / "run", str(path))
    assert preflight(run, 1).path == run.run_dir
    other = replace(run, model=replace(run.model, width=64), moe=replace(run.moe, top_k=1))
    with pytest.raises(
        ValueError, match=r"another model or mesh \(model.width was 32, is 64; moe.top_k was 2, is 1\); .* --profile"
    ):
        preflight(other, 1)
    with pytest.raises(ValueError, match=r"mesh.ep was 1, is 2\)"):
        preflight(replace(run, mesh=MeshConfig(ep=2)), 2)
    path.write_text(path.read_text().replace("0.00023", "0.00024"))
    with pytest.raises(ValueError, match=r"was changed since it was measured.*--profile"):
        preflight(run, 1)
    with pytest.raises(ValueError, match="must be modelled, measured or a file, got 'mesured'"):
        preflight(weighing(corpus, tmp_path / "run", "mesured"), 1)


def test_the_option_that_measures(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train", "--preset", "tiny", "--data.path", str(corpus), "--run-dir", str(tmp_path / "run")]
    assert main([*options, "--profile", "--check", "1"]) == 2
    assert "sequence.costs (measured) are what sequence.planner bytescale or moetrain weigh by" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert main([*options, "--profile", "--sequence.planner", "moetrain", "--check", "1"]) == 0
    assert main([*options, "--profile=yes", "--check", "1"]) == 2
    assert "--profile takes no value, got '--profile=yes'" in capsys.readouterr().err


def test_a_file_that_no_run_wrote_is_not_replaced(corpus: Path, tmp_path: Path) -> None:
    run = weighing(corpus, tmp_path / "run")
    run.run_dir.mkdir()
    (run.run_dir / "profile.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match=r"holds profile.json that no run has written"):
        preflight(run, 1)
