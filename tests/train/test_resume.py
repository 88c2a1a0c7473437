"""A run goes on from a checkpoint of its own alone, and says what is no longer as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from layer_configs import layer_config
from ranks import run_on_ranks
from train.tiny_run import losses, make_run, used_folder

from moetrain.checkpoint import Manifest as CheckpointManifest
from moetrain.checkpoint import list_checkpoints
from moetrain.checkpoint.names import remove_all
from moetrain.config import MeshConfig, RunConfig
from moetrain.config.load import load_run, to_dict
from moetrain.data.manifest import Manifest, data_facts
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.loop import train
from moetrain.train.preflight import preflight
from moetrain.train.resume import not_resumable, remarks, require_same_run
from moetrain.train.run_folder import RunFolder
from moetrain.train.world import RefusedByAllError

LOOKS = layer_config(num_experts=6, top_k=2, expert_width=24, capacity_factor=1.25)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four steps, with checkpoints after 2 and 4."""
    run = make_run(corpus, tmp_path_factory.mktemp("resume") / "run", steps=4, dtype="auto")
    train(run)
    return run


def copied(finished: RunConfig, folder: Path, **extra: Any) -> RunConfig:
    """The same run with nothing but the checkpoint after 2 steps; ``extra`` is laid over its JSON, None removes."""
    run = replace(finished, run_dir=folder / "run")
    path = run.run_dir / "checkpoints" / "step-00000002"
    shutil.copytree(list_checkpoints(finished.run_dir / "checkpoints")[0], path)
    manifest = CheckpointManifest.read(path)
    laid = {key: value for key, value in {**manifest.extra, **extra}.items() if value is not None}
    replace(manifest, extra=laid).write(path)
    return run


def check_refused(run: RunConfig, text: str) -> None:
    """Nothing is left under way or behind: the folder stays free for the run that it is of."""
    before = sorted(run.run_dir.rglob("*"))
    with pytest.raises(RefusedByAllError, match=text):
        train(run)
    assert not dist.is_initialized()
    assert sorted(path for path in run.run_dir.rglob("*") if path.name != ".lock") == before


def other_dataset(folder: Path) -> Path:
    (folder / "text").mkdir(parents=True)
    for idx in range(8):
        (folder / "text" / f"{idx}.txt").write_text(f"another text {idx} " * 60)
    prepare([Source(name="words", path=folder / "text")], folder / "corpus", validation_fraction=0.3)
    return folder / "corpus"


@pytest.mark.dist
def test_copied_checkpoints_of_another_run_are_refused_and_those_of_this_one_go_on(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path)
    check_refused(
        replace(run, optim=replace(run.optim, lr=0.5)),
        r"run_dir .* holds a run with another configuration \(optim.lr was 0.003, is 0.5\); choose another --run-dir "
        r"and start from this run's newest checkpoint with --from .*run, or replace that run with --train.overwrite",
    )
    capsys.readouterr()
    train(replace(run, train=replace(run.train, log_every=2)))  # the right one, with a field that is free
    out = capsys.readouterr().out
    assert "after step 2" in out
    assert "the checkpoint's steps before it" not in out
    last = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[-2])
    assert (last["step"], last["loss"]) == (4, losses(finished.run_dir)[4])


@pytest.mark.dist
def test_a_dataset_that_moved_goes_on_and_one_that_was_replaced_does_not(finished: RunConfig, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    shutil.copytree(run.data.path, tmp_path / "corpus")
    moved = replace(run, data=replace(run.data, path=tmp_path / "corpus"))
    shutil.copytree(run.run_dir, tmp_path / "again")
    train(moved)
    shutil.rmtree(tmp_path / "corpus")
    other_dataset(tmp_path / "other").rename(tmp_path / "corpus")
    check_refused(
        replace(moved, run_dir=tmp_path / "again"),
        r"holds a run on other data than .*corpus has now \(its file words.train.bin was '\w{64}', is '\w{64}'; .*; "
        r"restore the dataset, or choose another --run-dir",
    )


@pytest.mark.dist
def test_a_run_folder_goes_on_with_a_moved_dataset(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its ``config.toml``, which names the old path; to the bit, as what is there is the same."""
    run = replace(finished, run_dir=tmp_path / "run", data=replace(finished.data, path=tmp_path / "moved"))
    shutil.copytree(finished.run_dir, run.run_dir)
    shutil.rmtree(list_checkpoints(run.run_dir / "checkpoints")[-1])
    (run.run_dir / "summary.json").unlink()
    shutil.copytree(finished.data.path, run.data.path)
    train(run)
    assert "after step 2" in capsys.readouterr().out
    assert losses(run.run_dir) == losses(finished.run_dir)
    assert load_run(["--config", str(run.run_dir / "config.toml")]).data.path == run.data.path
    RunFolder(run.run_dir).check(finished)  # a machine that has it where it was goes on too


def test_other_data_at_another_path_are_refused_before_anything_starts(finished: RunConfig, tmp_path: Path) -> None:
    run = replace(finished, run_dir=tmp_path / "run", data=replace(finished.data, path=other_dataset(tmp_path)))
    shutil.copytree(finished.run_dir, run.run_dir)
    with pytest.raises(
        ValueError, match=r"holds a run on other data than .*corpus has now \(its file words.train.bin was"
    ):
        preflight(run, 1)


@pytest.mark.parametrize("same", [True, False])
def test_without_a_checkpoint_the_old_path_says_what_the_data_were(same: bool, corpus: Path, tmp_path: Path) -> None:
    """A run that was killed before its first one; where the old path has gone too, nothing is known."""
    shutil.copytree(corpus, tmp_path / "old")
    run = make_run(tmp_path / "old", tmp_path / "run")
    used_folder(run)
    remove_all(run.run_dir / "checkpoints")
    moved = replace(run, data=replace(run.data, path=corpus if same else other_dataset(tmp_path)))
    if same:
        preflight(moved, 1)
    else:
        with pytest.raises(ValueError, match="holds a run on other data"):
            preflight(moved, 1)
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(ValueError, match=r"another configuration \(data.path was '.*old', is '"):
        preflight(moved, 1)


@pytest.mark.dist
def test_a_checkpoint_from_before_data_and_type_were_noted_goes_on(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path, data=None, dtype=None)
    shutil.copytree(run.data.path, tmp_path / "corpus")
    check_refused(replace(run, data=replace(run.data, path=tmp_path / "corpus")), r"\(data.path was .*, is .*corpus'\)")
    train(run)
    assert "after step 2" in capsys.readouterr().out


@pytest.mark.dist
def test_the_type_of_compute_counts_and_not_the_word_for_it(finished: RunConfig, tmp_path: Path) -> None:
    """``auto`` goes on as the type that it has come to, to the bit, and in no other, whoever says so."""
    written = json.loads((finished.run_dir / "summary.json").read_text())["dtype"]
    saved = CheckpointManifest.read(list_checkpoints(finished.run_dir / "checkpoints")[0]).extra
    assert (finished.train.dtype, saved["dtype"]) == ("auto", written)
    assert saved["data"] == data_facts(Manifest.read(finished.data.path))
    other = {"float32": "bfloat16", "bfloat16": "float32"}[written]
    run = copied(finished, tmp_path / "other", dtype=other)
    check_refused(run, rf"\(train.dtype was '{other}', is '{written}' \(auto here\)\); choose another")
    run = copied(finished, tmp_path / "named")
    check_refused(named(run, other), rf"\(train.dtype was '{written}', is '{other}'\); choose another")
    train(named(run, written))
    last = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[-2])
    assert (last["step"], last["loss"]) == (4, losses(finished.run_dir)[4])


def named(run: RunConfig, dtype: Any) -> RunConfig:
    return replace(run, train=replace(run.train, dtype=dtype))


def test_the_folder_refuses_another_type_of_compute_early(finished: RunConfig, tmp_path: Path) -> None:
    written = json.loads((finished.run_dir / "summary.json").read_text())["dtype"]
    other = {"float32": "bfloat16", "bfloat16": "float32"}[written]
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished.run_dir, folder.path)
    run = replace(finished, run_dir=folder.path)
    folder.check(named(run, written))
    with pytest.raises(ValueError, match=rf"\(train.dtype was '{written}', is '{other}'\)"):
        folder.check(named(run, other))
    for was in (written, other):  # what auto means here only the ranks know
        folder.write_config(named(run, was))
        folder.check(run)
    remove_all(folder.checkpoints)
    with pytest.raises(ValueError, match=rf"\(train.dtype was '{other}', is 'auto'\)"):
        folder.check(run)


def test_initial_weights_count_until_there_are_others(finished: RunConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(finished.run_dir, folder.path)
    run = replace(finished, run_dir=folder.path)
    drawn = replace(run, model=replace(run.model, init_std=0.5))
    folder.check(drawn)
    remove_all(folder.checkpoints)
    with pytest.raises(ValueError, match=r"\(model.init_std was 0.02, is 0.5\)"):
        folder.check(drawn)


@pytest.mark.dist
def test_initial_weights_change_no_bit_of_what_goes_on(finished: RunConfig, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    train(replace(run, model=replace(run.model, init_std=0.5)))
    last = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[-2])
    assert (last["step"], last["loss"]) == (4, losses(finished.run_dir)[4])


@pytest.mark.parametrize(
    ("layer", "fields"),
    [
        ({"capacity_factor": 1.25}, "dispatch.capacity_factor"),
        ({"rounding": "nearest"}, "dispatch.rounding"),
        ({"balance_scope": "micro", "rounding": "up"}, "dispatch.rounding and balance.scope"),
        ({}, ""),
    ],
)
def test_another_mesh_is_told_where_something_looks_at_micro_batches(
    layer: dict[str, Any], fields: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tmp_path, layer=layer_config(num_experts=6, top_k=2, **layer))
    extra = {"config": to_dict(replace(run, mesh=MeshConfig(ep=2))), "world_size": 4, "dtype": "float32"}
    now = FoldedMesh(tp=2, edp=2)
    said = (
        "on dp=1, tp=2, edp=2, ep=1, etp=1, the checkpoint's steps before it on dp=4, tp=1, edp=2, ep=2, etp=1: "
        f"{fields} will look at other sets of tokens, so what is learnt from here on is not what it would have been "
        "there"
    )
    assert remarks(extra, run, now) == ([said] if fields else [])
    same = FoldedMesh(dp_replicate=2, dp_shard=2, edp=2, ep=2, ranks_per_node=2)  # parameters lie otherwise, tokens not
    assert remarks(extra, run, same) == []
    assert remarks({}, run, now) == []


@pytest.mark.dist
def test_a_run_that_goes_on_says_that_its_mesh_was_another(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(corpus, tmp_path / "first", steps=4, layer=LOOKS)
    train(first)
    train(copied(first, tmp_path, world_size=2))
    said = [line for line in capsys.readouterr().out.splitlines() if "other sets of tokens" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "on dp=1, tp=1, edp=1, ep=1, etp=1, the checkpoint's steps before it on dp=2, tp=1, edp=2"
    )


def test_a_configuration_of_another_version_is_refused_by_its_key(corpus: Path, tmp_path: Path) -> None:
    run = make_run(corpus, tmp_path / "run")
    config = to_dict(run) | {"flux": 3}
    said = not_resumable(RunFolder(run.run_dir), {"config": config}, run, {}, "float32")
    assert said.startswith(
        f"run_dir {run.run_dir} holds a run with another configuration (it is not one of this version"
    )
    assert "unknown key 'flux'" in said


def refuse_body(rank: int, run: RunConfig) -> str:
    """The second rank alone would go on."""
    group = dist.group.WORLD
    assert group is not None
    folder, extra = RunFolder(run.run_dir), {"config": to_dict(run), "data": {"tokenizer": "byte"}}
    require_same_run(folder, extra, run, {"tokenizer": "byte"}, "float32", group)
    with pytest.raises(RefusedByAllError) as caught:
        require_same_run(folder, extra, run, {"tokenizer": "byte" if rank else "other"}, "float32", group)
    dist.barrier()
    return str(caught.value)


@pytest.mark.dist
def test_all_ranks_refuse_together(corpus: Path, tmp_path: Path) -> None:
    messages = run_on_ranks(2, refuse_body, make_run(corpus, tmp_path / "run"))
    assert messages[0] == messages[1]
    assert "its tokenizer was 'byte', is 'other'" in messages[0]
