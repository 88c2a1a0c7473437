"""A run starts from another one's checkpoint, with other settings and its own folder, and never twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layer_configs import layer_config
from safetensors.torch import load_file
from train.tiny_run import losses, make_run, run_train, used_folder

from moetrain.checkpoint import Manifest, list_checkpoints, step_path
from moetrain.cli.main import main
from moetrain.config import MeshConfig, OptimConfig, RunConfig, StartConfig, load_run, to_dict, to_toml
from moetrain.data.loader import RowLoader
from moetrain.train.learning_rate import learning_rate
from moetrain.train.loop import train
from moetrain.train.preflight import preflight
from moetrain.train.run_folder import RunFolder
from moetrain.train.source import base_of_start, locate
from moetrain.train.world import RefusedByAllError

STEPS = 4


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four steps, with checkpoints after 2 and 4."""
    layer = layer_config(num_experts=6, top_k=2, expert_width=24, loss_free=True, score="sigmoid")
    run = make_run(corpus, tmp_path_factory.mktemp("source") / "run", steps=STEPS, layer=layer)
    train(run)
    return run


def started(source: RunConfig, run_dir: Path, at: str = "@2", **start: Any) -> RunConfig:
    """A run like ``source`` that starts from it."""
    checkpoint = Path(f"{source.run_dir}{at}")
    return replace(source, run_dir=run_dir, start=StartConfig(checkpoint=checkpoint, **start))


def records(run: RunConfig) -> dict[int, dict[str, Any]]:
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines) if "loss" in record}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in checkpoint.glob("*.safetensors") for key, value in load_file(file).items()}


def without_summary_and_newest(run: RunConfig) -> None:
    """As if the run had been killed before its last checkpoint."""
    (run.run_dir / "summary.json").unlink()
    shutil.rmtree(list_checkpoints(run.run_dir / "checkpoints")[-1])


@pytest.mark.dist
def test_with_the_same_settings_it_goes_on_to_the_bit(
    source: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = started(source, tmp_path / "run")
    saved = step_path(source.run_dir / "checkpoints", 2)
    summary = train(run)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"started from {saved}, after its step 2: weights and moments; steps and rows count on from there"
    )
    assert "other than there" not in "".join(out)
    assert {step: record["loss"] for step, record in records(run).items()} == {
        step: losses(source.run_dir)[step] for step in (3, 4)
    }
    newest = [list_checkpoints(folder / "checkpoints")[-1] for folder in (source.run_dir, run.run_dir)]
    left, right = map(tensors, newest)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    assert any("bias" in key and value.abs().sum() > 0 for key, value in left.items())  # they came with the weights
    noted = summary["started_from"]
    assert noted == {
        "checkpoint": str(saved),
        "step": 2,
        "moments": True,
        "position": True,
        "differences": [],
        "sha256": json.loads((saved / "metadata.json").read_text())["sha256"],
    }
    assert json.loads((run.run_dir / "summary.json").read_text())["started_from"] == noted
    assert Manifest.read(newest[1]).extra["started_from"] == noted


@pytest.mark.dist
def test_what_is_learnt_otherwise_may_change_and_is_told(
    source: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint, more steps, and another rate, norm and weight of the balance loss."""
    run = started(source, tmp_path / "run", at="")
    run = replace(
        run, train=replace(run.train, steps=6, eval_every=3), optim=replace(run.optim, lr=1e-3, clip_norm=0.5)
    )
    run = replace(run, balance=replace(run.balance, z_loss_coef=0.5))
    summary = train(run)
    out = capsys.readouterr().out
    differences = [
        "balance.z_loss_coef was 0.001, is 0.5",
        "optim.clip_norm was 1.0, is 0.5",
        "optim.lr was 0.003, is 0.001",
        "train.steps was 4, is 6",
    ]
    assert [line for line in out.splitlines() if line.startswith("other than there")] == [
        f"other than there: {difference}" for difference in differences
    ]
    assert summary["started_from"]["differences"] == differences
    assert {step: record["lr"] for step, record in records(run).items()} == {
        step: learning_rate(step - 1, run.optim, 6) for step in (5, 6)
    }


@pytest.mark.dist
def test_weights_alone_begin_anew(source: RunConfig, tmp_path: Path) -> None:
    run = started(source, tmp_path / "run", optimizer=False, position=False)
    summary = train(run)
    assert list(records(run)) == [1, 2, 3, 4]
    assert records(run)[1]["lr"] == learning_rate(0, run.optim, STEPS)
    assert records(run)[1]["loss"] < losses(source.run_dir)[1] - 0.2  # the same rows, two steps wiser
    assert (summary["started_from"]["moments"], summary["started_from"]["position"]) == (False, False)
    last = Manifest.read(list_checkpoints(run.run_dir / "checkpoints")[-1]).extra
    assert (last["num_updates"], last["next_row"]) == (4, 24)


@pytest.mark.dist
def test_moments_are_left_out_on_request(source: RunConfig, tmp_path: Path) -> None:
    """The next step's loss is that of the same weights; what that step does to them is not."""
    run = started(source, tmp_path / "run", optimizer=False)
    train(run)
    assert records(run)[3]["loss"] == losses(source.run_dir)[3]
    assert records(run)[4]["loss"] != losses(source.run_dir)[4]
    assert Manifest.read(list_checkpoints(run.run_dir / "checkpoints")[-1]).extra["num_updates"] == 2


@pytest.mark.dist
def test_no_row_is_read_twice_or_left_out_with_another_batch(
    source: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the new run was resumed: 2 x 6 rows there, 4 each here."""
    run = started(source, tmp_path / "run")
    run = replace(run, data=replace(run.data, global_batch=4), train=replace(run.train, steps=5, eval_every=0))
    run = replace(run, checkpoint=replace(run.checkpoint, every=1))
    read: list[int] = []
    table = RowLoader.table

    def noted(self: RowLoader, first_row: int, num_rows: int) -> Any:
        if self.dataset.split == "train":
            read.extend(range(first_row, first_row + num_rows))
        return table(self, first_row, num_rows)

    monkeypatch.setattr(RowLoader, "table", noted)
    train(run)
    assert read == list(range(12, 24))
    without_summary_and_newest(run)
    train(run)
    assert read == [*range(12, 24), *range(20, 24)]


@pytest.mark.dist
@pytest.mark.parametrize(("first", "second"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_optimizer_starts_without_moments(
    first: Any, second: Any, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(corpus, tmp_path / "first", steps=2, optim=OptimConfig(name=first, warmup_steps=1))
    train(run)
    other = started(run, tmp_path / "second")
    other = replace(other, optim=replace(run.optim, name=second), train=replace(run.train, steps=4))
    assert train(other)["started_from"]["moments"] is False
    assert "weights, no moments; steps and rows count on" in capsys.readouterr().out
    assert list(records(other)) == [3, 4]


@pytest.mark.dist
def test_another_mesh_starts_from_the_same_weights(source: RunConfig, tmp_path: Path) -> None:
    run = replace(started(source, tmp_path / "run"), mesh=MeshConfig(ep=2))
    code, out, err = run_train(run, tmp_path, 2)
    assert code == 0, err
    assert "started from" in out
    assert [record["loss"] for record in records(run).values()] == pytest.approx(
        [losses(source.run_dir)[step] for step in (3, 4)], rel=1e-5
    )


@pytest.mark.dist
@pytest.mark.parametrize("without_config", [False, True])
def test_a_run_that_goes_on_needs_its_source_no_more(
    without_config: bool, source: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source.run_dir, tmp_path / "source")
    run = started(replace(source, run_dir=tmp_path / "source"), tmp_path / "run")
    run = replace(run, checkpoint=replace(run.checkpoint, every=1))
    first = train(run)
    without_summary_and_newest(run)
    shutil.rmtree(tmp_path / "source")
    if without_config:
        (run.run_dir / "config.toml").unlink()
    expected = records(run)
    capsys.readouterr()
    again = replace(run, start=StartConfig()) if without_config else run
    assert train(again)["started_from"] == first["started_from"]
    assert "after step 3" in capsys.readouterr().out
    assert {step: record["loss"] for step, record in records(run).items()} == {
        step: record["loss"] for step, record in expected.items()
    }
    noted = load_run(["--config", str(run.run_dir / "config.toml")]).start
    assert (noted.checkpoint, noted.sha256) == (
        Path(first["started_from"]["checkpoint"]),
        first["started_from"]["sha256"],
    )


@pytest.mark.dist
@pytest.mark.parametrize("asks", ["", "@2", None])
def test_killed_before_its_first_checkpoint_it_starts_where_it_had_started(
    asks: str | None, source: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not from what is the newest there now, and not from nothing where nobody says it again."""
    run = started(source, tmp_path / "run")
    run = replace(run, train=replace(run.train, steps=3))
    train(run)
    without_summary_and_newest(run)
    assert list_checkpoints(run.run_dir / "checkpoints") == []
    asked = StartConfig() if asks is None else StartConfig(checkpoint=Path(f"{source.run_dir}{asks}"))
    capsys.readouterr()
    train(replace(run, start=asked))
    assert f"started from {step_path(source.run_dir / 'checkpoints', 2)}, after its step 2" in capsys.readouterr().out
    assert list(records(run)) == [3]


@pytest.mark.dist
def test_another_start_is_another_run(source: RunConfig, tmp_path: Path) -> None:
    run = started(source, tmp_path / "run")
    train(run)
    with pytest.raises(
        ValueError, match=r"another configuration \(it started from .*step-00000002, --from is .*run@4 counting anew\)"
    ):
        preflight(started(source, run.run_dir, at="@4", position=False), 1)
    with pytest.raises(ValueError, match=r"it started from .*step-00000002, --from is .*run@2 without moments"):
        preflight(started(source, run.run_dir, optimizer=False), 1)
    with pytest.raises(ValueError, match=r"it started from nothing, --from is .*run@2"):
        preflight(started(run, source.run_dir, at="@2"), 1)
    (run.run_dir / "config.toml").unlink()
    (run.run_dir / "summary.json").unlink()
    with pytest.raises(RefusedByAllError, match=r"it started from .*step-00000002, --from is .*run@2 counting anew"):
        train(started(source, run.run_dir, position=False))


@pytest.mark.dist
@pytest.mark.parametrize("with_checkpoint", [True, False])
@pytest.mark.parametrize("asks", ["", "@2"])
def test_a_run_whose_folder_is_called_like_a_step_is_repeated(
    asks: str, with_checkpoint: bool, source: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It notes the other run's checkpoint, not itself; what older runs have noted is read as they meant it."""
    shutil.copytree(source.run_dir, tmp_path / "x")
    if not asks:
        shutil.rmtree(step_path(tmp_path / "x" / "checkpoints", 4))
    options = ["train", "--from", f"{tmp_path / 'x'}{asks}", "--run-dir", f"{tmp_path / 'x@2'}", "--steps", "3"]
    run = replace(source, run_dir=tmp_path / "x@2")
    assert main(options) == 0
    config = run.run_dir / "config.toml"
    noted = load_run(["--config", str(config)])
    assert noted.start.checkpoint == step_path(tmp_path / "x" / "checkpoints", 2)
    assert main(options) == 0
    older = replace(noted, start=replace(noted.start, checkpoint=run.run_dir, sha256=None))
    if not with_checkpoint:
        without_summary_and_newest(run)
    RunFolder(run.run_dir).write_config(older)
    capsys.readouterr()
    assert main(options) == 0
    assert ("started from" in capsys.readouterr().out) == (not with_checkpoint)


@pytest.mark.dist
def test_a_moved_source_is_known_by_what_it_is(
    source: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its folder's new name, also before the new run's first checkpoint; another one there is another start."""
    shutil.copytree(source.run_dir, tmp_path / "x")
    run = started(replace(source, run_dir=tmp_path / "x"), tmp_path / "run")
    run = replace(run, train=replace(run.train, steps=3))
    train(run)
    (tmp_path / "x").rename(tmp_path / "moved")
    options = ["train", "--run-dir", str(run.run_dir), "--steps", "3", "--from"]
    best = step_path(tmp_path / "moved" / "checkpoints", 2)
    for asked in (f"{tmp_path / 'moved'}@2", str(tmp_path / "moved"), str(best)):
        assert main([*options, asked]) == 0, capsys.readouterr().err
    with pytest.raises(ValueError, match=r"it started from .*step-00000002, --from is .*moved@4"):
        preflight(replace(run, start=StartConfig(checkpoint=Path(f"{tmp_path / 'moved'}@4"))), 1)
    (run.run_dir / "config.toml").rename(tmp_path / "kept.toml")
    (run.run_dir / "summary.json").unlink()
    again = StartConfig(checkpoint=Path(f"{tmp_path / 'moved'}@2"))
    train(replace(run, start=again))
    assert "resumed from" in capsys.readouterr().out
    (tmp_path / "kept.toml").rename(run.run_dir / "config.toml")
    without_summary_and_newest(run)
    train(replace(run, start=again))
    assert f"started from {best}, after its step 2" in capsys.readouterr().out
    assert load_run(["--config", str(run.run_dir / "config.toml")]).start.checkpoint == best


def damage(checkpoint: Path, how: str) -> None:
    file = next(checkpoint.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(bytes(data))
    elif how == "shorten":
        file.write_bytes(bytes(data[:-1]))
    elif how == "remove":
        file.unlink()
    else:
        (checkpoint / "metadata.json").write_text("{}")


@pytest.mark.parametrize(
    ("at", "change", "text"),
    [
        (
            "/nowhere",
            {},
            r"--from must name a run's folder or a checkpoint's, as RUN or RUN@STEP, but .*nowhere is none",
        ),
        ("@3", {}, r"--from: .*run has no checkpoint of step 3; it has those of steps 2, 4"),
        ("@4", {}, r"train.steps \(4\) must be more than the 4 steps that --from .*run@4 has done; raise train.steps"),
        ("@2", {"seed": 9, "moe": {"top_k": 3}}, r"is of another model \(moe.top_k was 2, is 3\); give the same model"),
        ("@2", {"model": {"rope_theta": 5e5}}, r"another model \(model.rope_theta was 10000.0, is 500000.0\)"),
        ("@2", {"damage": "shorten"}, r"step-00000002 is damaged: data-00000.safetensors has \d+ bytes instead of"),
        ("@2", {"damage": "remove"}, r"step-00000002 is damaged: data-00000.safetensors is missing; name another one"),
        ("@2", {"damage": "metadata"}, r"step-00000002 is damaged: metadata.json cannot be read"),
        ("/checkpoints/step-00000002", {"damage": "remove"}, r"step-00000002 is damaged"),
        ("/mine", {}, r"--from: .*mine holds no checkpoint; name the folder of a run that has saved one"),
    ],
)
def test_what_no_run_can_start_from_is_refused_first(
    at: str, change: dict[str, Any], text: str, source: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(source.run_dir, tmp_path / "run")
    (tmp_path / "run" / "mine").mkdir()
    run = started(replace(source, run_dir=tmp_path / "run"), tmp_path / "new", at=at)
    if "damage" in change:
        damage(tmp_path / "run" / "checkpoints" / "step-00000002", change["damage"])
    else:
        for name, value in change.items():
            run = replace(run, **{name: replace(getattr(run, name), **value) if isinstance(value, dict) else value})
    with pytest.raises(ValueError, match=text):
        preflight(run, 1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("at", ["", "@2", "/checkpoints/step-00000002", "/checkpoints"])
def test_a_run_does_not_start_from_its_own_folder(at: str, source: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(source.run_dir, tmp_path / "run")
    run = started(replace(source, run_dir=tmp_path / "run"), tmp_path / "run", at=at)
    overwriting = replace(run, train=replace(run.train, overwrite=True))
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    for wanted, text in (
        (run, "it started from nothing, --from is"),
        (overwriting, "must be another folder than that"),
    ):
        with pytest.raises(ValueError, match=text):
            preflight(wanted, 1)
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("name", ["run", "a@5", "a@b"])
def test_the_newest_whole_checkpoint_is_meant_by_a_run(
    name: str, source: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / name
    shutil.copytree(source.run_dir, folder)
    steps = {step: step_path(folder / "checkpoints", step) for step in (2, 4)}
    assert locate(folder).path == locate(folder / "checkpoints").path == steps[4]
    assert locate(Path(f"{folder}@2")).path == locate(steps[2]).path == steps[2]
    shutil.copytree(steps[2], tmp_path / "best")
    assert locate(tmp_path / "best").path == tmp_path / "best"
    damage(steps[4], "shorten")
    assert locate(folder).path == steps[2]
    assert "step-00000004 is damaged" in caplog.text
    damage(steps[2], "metadata")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* is whole \(see the warnings\)"):
        locate(folder)


@pytest.mark.dist
def test_a_flipped_bit_of_the_source_is_found_by_all_ranks_together(source: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(source.run_dir, tmp_path / "source")
    run = started(replace(source, run_dir=tmp_path / "source"), tmp_path / "new")
    damage(tmp_path / "source" / "checkpoints" / "step-00000002", "flip")
    with pytest.raises(RefusedByAllError, match=r"--from: checkpoint .*step-00000002 is damaged: .* its checksum"):
        train(run)
    assert not dist.is_initialized()
    assert not (run.run_dir / "config.toml").exists()


def test_options_are_laid_over_the_sources_configuration(source: RunConfig, tmp_path: Path) -> None:
    options = ["--from", f"{source.run_dir}@2", "--optim.lr", "0.001", "--run-dir", str(tmp_path / "new")]
    run = load_run(options, base=base_of_start)
    wanted = started(source, tmp_path / "new")
    assert run == replace(wanted, optim=replace(source.optim, lr=1e-3))
    assert load_run([*options, "--preset", "tiny"], base=base_of_start).model != source.model
    assert load_run(["--optim.lr", "0.001"], base=base_of_start) == load_run(["--optim.lr", "0.001"])
    used_folder(replace(run, seed=77))  # its own folder, once it has one, even where the source is gone
    assert load_run(options, base=base_of_start).seed == 77
    assert load_run([*options, "--start.position", "false"], base=base_of_start).seed == source.seed
    overwriting = Manifest.read(list_checkpoints(source.run_dir / "checkpoints")[0])
    extra = {**overwriting.extra, "config": to_dict(replace(source, train=replace(source.train, overwrite=True)))}
    (tmp_path / "best").mkdir()
    replace(overwriting, extra=extra, files={}).write(tmp_path / "best")
    assert load_run(["--from", str(tmp_path / "best")], base=base_of_start).train.overwrite is False


@pytest.mark.dist
def test_a_run_that_ended_in_nan_says_how_to_go_on(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it says is true."""
    run = make_run(corpus, tmp_path / "run", steps=30, optim=OptimConfig(lr=1e30, warmup_steps=8))
    run = replace(run, checkpoint=replace(run.checkpoint, every=1, keep=0))
    (tmp_path / "run.toml").write_text(to_toml(run))
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"start another run with --from {run.run_dir}@STEP --run-dir NEW --optim.lr LOWER (steps 1" in said
    steps = said.rpartition("(steps ")[2].partition(" are saved")[0].split(", ")
    assert steps == [str(step) for step in range(1, len(steps) + 1)]
    new = ["--from", f"{run.run_dir}@1", "--run-dir", str(tmp_path / "new"), "--optim.lr", "0.001", "--steps", "8"]
    assert main(["train", *new, "--start.optimizer", "false"]) in (0, 1)
    assert "other than there: optim.lr was 1e+30, is 0.001" in capsys.readouterr().out
