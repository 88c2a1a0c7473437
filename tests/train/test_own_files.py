"""Only what a run has written is replaced or removed; a folder of 0.1.0, which set no stamps, is known all the same."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from train.tiny_run import make_run, used_folder

from moetrain.checkpoint import list_checkpoints
from moetrain.cli.main import main
from moetrain.config import RunConfig, to_toml
from moetrain.train.loop import train
from moetrain.train.own_files import stamped, strangers
from moetrain.train.run_folder import RunFolder

BY_US = {"versions": {"moetrain": "0.1.0", "torch": "2.13.0"}, "steps": 6}
STEP = {"step": 1, "loss": 5.5, "num_loss_tokens": 180}
MINE = {
    "checkpoints/mine/model.pt": b"weights",
    "checkpoints/best.txt": b"mine",
    "checkpoints/step-00000002/notes.txt": b"the good one",
    "checkpoints/step-00000100/model.pt": b"another program's",
    "checkpoints/step-00000101/metadata.json": b'{"by": "my own trainer"}',
    "checkpoints/step-00000101/data-00000.safetensors": b"its data",
    "notes.md": b"# Notes",
}


def lay(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def overwriting(run: RunConfig) -> RunConfig:
    return replace(run, train=replace(run.train, overwrite=True))


def test_overwriting_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    used_folder(run)
    folder = RunFolder(run.run_dir)
    folder.write_summary(BY_US)
    lay(run.run_dir, MINE)
    folder.check(overwriting(run))
    folder.make(overwriting(run))
    assert content(run.run_dir) == MINE


@pytest.mark.dist
def test_a_project_with_files_of_its_own_holds_runs(corpus: Path, tmp_path: Path) -> None:
    """Trained in, overwritten, pruned and gone on with: every file of the user's is as it was."""
    run = make_run(corpus, tmp_path / "run", steps=4)
    run = replace(run, checkpoint=replace(run.checkpoint, every=1, keep=1))
    lay(run.run_dir, MINE)
    for wanted in (run, overwriting(run), run):
        train(wanted)
        found = content(run.run_dir)
        assert {name: found[name] for name in MINE} == MINE
        assert [path.name for path in list_checkpoints(run.run_dir / "checkpoints")] == ["step-00000004"]
    assert (aside := RunFolder(run.run_dir).set_aside()) is not None
    assert content(run.run_dir) == MINE
    assert [path.name for path in (aside / "checkpoints").iterdir()] == ["step-00000004"]
    RunFolder(run.run_dir).check(run)


@pytest.mark.parametrize(
    ("steps", "every", "refused"), [(1000, 0, True), (1500, 500, True), (1500, 400, False), (500, 500, False)]
)
def test_another_programs_checkpoint_is_refused_only_in_the_way(
    steps: int, every: int, refused: bool, tmp_path: Path
) -> None:
    """Neither called damaged nor a run; a folder that the run is to save in would hold both."""
    run = make_run(tmp_path / "corpus", tmp_path / "run", steps=steps)
    run = replace(run, checkpoint=replace(run.checkpoint, every=every))
    lay(run.run_dir, {"checkpoints/step-00001000/metadata.json": b'{"by": "my own trainer"}'})
    before = content(run.run_dir)
    for wanted in (run, overwriting(run)):
        if refused:
            with pytest.raises(ValueError, match=r"step-00001000/metadata.json that no run .* save its step 1000; re"):
                RunFolder(run.run_dir).check(wanted)
        else:
            RunFolder(run.run_dir).begin(wanted)
    assert RunFolder(run.run_dir).set_aside() is None
    assert content(run.run_dir) == before


WRITTEN_BY_HAND = {
    "config.toml": '# the one that works\npreset = "tiny"\n[optim]\nlr = 1e-3\n',
    "summary.json": '{"steps": 6, "accuracy": 0.93}\n',
    "metrics.jsonl": '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n',
}


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_the_users_own_is_refused_and_stays(name: str, overwrite: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    files = {name: WRITTEN_BY_HAND[name].encode()}
    lay(run.run_dir, files)
    with pytest.raises(ValueError, match=rf"holds {name} that no run has written .*; rename it, or choose another"):
        RunFolder(run.run_dir).check(overwriting(run) if overwrite else run)
    assert content(run.run_dir) == files


def test_a_file_that_came_after_the_check_is_not_removed(tmp_path: Path) -> None:
    run = overwriting(make_run(tmp_path / "corpus", tmp_path / "run"))
    used_folder(run)
    RunFolder(run.run_dir).check(run)
    (run.run_dir / "summary.json").write_text("mine")
    before = content(run.run_dir)
    with pytest.raises(ValueError, match=r"holds summary.json that no run has written"):
        RunFolder(run.run_dir).make(run)
    assert content(run.run_dir) == before


def test_a_configuration_in_the_run_folder_is_not_replaced_by_itself(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = f'# mine\npreset = "tiny"\n[data]\npath = "{corpus}"\n'
    lay(tmp_path / "proj", {"config.toml": text.encode()})
    assert main(["train", "--config", "proj/config.toml", "--run-dir", "proj"]) == 2
    assert capsys.readouterr().err == (
        "moetrain: run_dir proj holds config.toml that no run has written or that was changed since, and training "
        "would replace it; rename it, or choose another --run-dir\n"
    )
    assert content(tmp_path / "proj") == {"config.toml": text.encode()}


Change = Callable[[str], str]
CHANGES: dict[str, tuple[Change, bool]] = {
    "as it was written": (lambda text: text, True),
    "a value": (lambda text: text.replace("lr = 0.003", "lr = 0.004"), False),
    "a comment behind": (lambda text: text + "# the good one\n", False),
    "no stamp, and a comment": (lambda text: "# mine\n" + text.partition("\n")[2], False),
    "no stamp, as 0.1.0 wrote it": (lambda text: text.partition("\n")[2], True),
    "no stamp, and no whole configuration": (lambda text: "seed = 3\n[model]\nwidth = 8\n", False),
    "no TOML": (lambda text: "seed = \n", False),
    "not UTF-8": (lambda text: text + 'x = "\udcff"\n', False),
    "empty": (lambda text: "", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_configuration_is_known_by_its_stamp_until_it_is_changed(change: str, tmp_path: Path) -> None:
    made = make_run(tmp_path / "corpus", tmp_path / "run")
    used_folder(made)
    path = tmp_path / "run" / "config.toml"
    changed, is_ours = CHANGES[change]
    path.write_bytes(changed(stamped(to_toml(made))).encode(errors="surrogateescape"))
    assert strangers(tmp_path / "run") == ([] if is_ours else ["config.toml"])
    (tmp_path / "run" / "metrics.jsonl").unlink()  # without them, an unstamped copy is the user's
    assert strangers(tmp_path / "run") == ([] if change == "as it was written" else ["config.toml"])


@pytest.mark.parametrize(
    ("name", "text", "is_ours"),
    [
        ("metrics.jsonl", "", True),
        ("metrics.jsonl", json.dumps(STEP) + "\n", True),
        ("metrics.jsonl", '{"step": 1, "lo', True),  # the machine stopped within the first record
        ("metrics.jsonl", "step 1", False),
        ("metrics.jsonl", "[1, 2]\n", False),
        ("summary.json", json.dumps(BY_US), True),
        ("summary.json", "[]", False),
        ("summary.json", "{", False),
        ("summary.json", '{"versions": "3"}', False),
    ],
)
def test_results_are_known_by_what_they_say(name: str, text: str, is_ours: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert strangers(tmp_path) == ([] if is_ours else [name])


SUMMARY_CHANGES: dict[str, tuple[Change, bool]] = {
    "as it was written": (lambda text: text, True),
    "spaces": (lambda text: text.replace("\n", ""), True),
    "a value": (lambda text: text.replace("5.25", "5.26"), False),
    "a note": (lambda text: text.replace("{", '{"note": "the good one",', 1), False),
    "cut short": (lambda text: text[:-9], False),
}


@pytest.mark.parametrize("change", SUMMARY_CHANGES)
def test_a_summary_is_known_until_it_is_changed(change: str, tmp_path: Path) -> None:
    RunFolder(tmp_path).write_summary({**BY_US, "train_loss": 5.25, "validation_loss": None, "one_third": 1 / 3})
    changed, is_ours = SUMMARY_CHANGES[change]
    path = tmp_path / "summary.json"
    path.write_text(changed(path.read_text()))
    assert strangers(tmp_path) == ([] if is_ours else ["summary.json"])


def test_folders_and_dangling_links_are_no_runs_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "summary.json").symlink_to(tmp_path / "nowhere")
    assert strangers(tmp_path) == ["metrics.jsonl", "summary.json"]


def test_a_file_where_checkpoints_belong_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    lay(run.run_dir, {"checkpoints": b"a list of them"})
    with pytest.raises(ValueError, match=r"must have a folder for checkpoints, but .*checkpoints is a file; rename it"):
        RunFolder(run.run_dir).check(run)


def test_a_run_is_set_aside_without_what_is_not_of_it(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(corpus, tmp_path / "run")
    used_folder(run)
    RunFolder(run.run_dir).write_summary(BY_US)
    (run.run_dir / "checkpoints" / "step-00000002" / "plot.png").write_bytes(b"png")
    ours = content(run.run_dir)
    mine = {name: data for name, data in MINE.items() if "step-00000002" not in name}
    lay(run.run_dir, mine)
    (tmp_path / "run.toml").write_text(to_toml(run))
    command = ["train", "--config", str(tmp_path / "run.toml"), "--check", "2", "--fresh"]
    assert main([*command, "--mesh.ep", "3"]) == 2  # a mistake moves nothing
    assert content(run.run_dir) == mine | ours
    capsys.readouterr()
    assert main([*command, "--mesh.ep", "2"]) == 0
    (aside,) = tmp_path.glob("run.*-*")
    assert f"moved the earlier run to {aside}\n" in capsys.readouterr().out
    assert content(aside) == ours
    assert content(run.run_dir) == mine
    assert main(command) == 0  # there is no run any more
    assert list(tmp_path.glob("run.*-*")) == [aside]
    for name, text in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--fresh"]) == 2
    assert "--fresh must be given to one process" in capsys.readouterr().err


def test_a_run_in_use_is_not_set_aside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    files = used_folder(run)
    with RunFolder(run.run_dir).locked(), pytest.raises(ValueError, match="is in use by another run"):
        RunFolder(run.run_dir).set_aside()
    assert {path: path.read_bytes() for path in files} == files
