"""A checkpoint's folder may hold a user's own files: those outlive whatever is done to the checkpoint."""

from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import UnsavedCheckpointError
from moetrain.checkpoint.folder import find_latest, verify
from moetrain.checkpoint.names import MANIFEST, own_files, remove_all
from moetrain.checkpoint.save_load import save
from moetrain.checkpoint.shards import LogicalTensor

FULL = torch.arange(6.0)


def write(folder: Path, step: int) -> Path:
    return save(folder, step, {"a": LogicalTensor.whole(FULL)}, {})


def damage_bit(path: Path) -> None:
    (path / "data-00000.safetensors").write_bytes((path / "data-00000.safetensors").read_bytes()[:-1] + b"?")


def noted(checkpoint: Path) -> Path:
    """A file and a folder of the user's own in a checkpoint."""
    (checkpoint / "notes.txt").write_text("the good one")
    (checkpoint / "plots").mkdir()
    (checkpoint / "plots" / "loss.png").write_bytes(b"png")
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def test_what_no_run_has_written_outlives_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither pruning nor removing everything touches a user's own files, or what a link leads to."""
    elsewhere = write(tmp_path / "elsewhere", 1)
    runs = tmp_path / "run"
    (runs / "mine").mkdir(parents=True)
    (runs / "mine" / "model.pt").write_bytes(b"weights")
    (runs / "step-00000005").mkdir()
    (runs / "step-00000005" / "model.pt").write_bytes(b"of another program")
    (runs / "step-00000001").symlink_to(elsewhere)
    noted(write(runs, 2))
    assert sorted(path.name for path in own_files(runs / "step-00000002")) == ["data-00000.safetensors", MANIFEST]
    save(runs, 9, {"a": LogicalTensor.whole(FULL)}, {}, keep=1)
    users = ["mine/model.pt", "step-00000002/notes.txt", "step-00000002/plots/loss.png", "step-00000005/model.pt"]
    assert names(runs) == sorted([*users, "step-00000009/data-00000.safetensors", "step-00000009/metadata.json"])
    assert "step-00000002 was removed but for what no run has written there" in caplog.text
    assert find_latest(runs) == runs / "step-00000009"
    write(runs, 10).rename(runs / ".draft-step-00000010")
    write(runs, 11).rename(runs / ".stale-step-00000011")
    remove_all(runs)
    assert names(runs) == users
    assert find_latest(runs) is None
    assert verify(elsewhere).step == 1


def test_saving_again_takes_over_what_is_not_ours(tmp_path: Path) -> None:
    """Also where a save was killed between its renames."""
    damage_bit(noted(write(tmp_path, 4)))
    write(tmp_path, 4)
    users = ["step-00000004/notes.txt", "step-00000004/plots/loss.png"]
    ours = ["step-00000004/data-00000.safetensors", "step-00000004/metadata.json"]
    assert names(tmp_path) == sorted([*users, *ours])
    (tmp_path / "step-00000004").rename(tmp_path / ".stale-step-00000004")
    write(tmp_path, 4)
    assert names(tmp_path) == sorted([*users, *ours])
    assert find_latest(tmp_path) == tmp_path / "step-00000004"


def test_a_draft_is_cleared_of_what_a_killed_save_has_left_alone(tmp_path: Path) -> None:
    """What else is in it comes along, under its own name or one that is free."""
    draft, stale = tmp_path / ".draft-step-00000004", tmp_path / ".stale-step-00000004"
    for number, folder in enumerate((draft, stale)):
        noted(write(tmp_path / str(number), 4)).rename(folder)
        (tmp_path / str(number)).rmdir()
        (folder / "notes.txt").write_text(f"mine {number}")
        (folder / "data-of-mine.csv").write_text("1,2")
    (draft / "data-00007.safetensors").write_bytes(b"of a rank that is no more")
    path = write(tmp_path, 4)
    assert verify(path).step == 4
    assert names(tmp_path) == sorted(
        f"step-00000004/{name}"
        for name in (
            *("notes.txt", "plots/loss.png", "data-of-mine.csv"),
            *("notes.txt.1", "plots.1/loss.png", "data-of-mine.csv.1"),
            *("data-00000.safetensors", "metadata.json"),
        )
    )
    assert [(path / name).read_text() for name in ("notes.txt", "notes.txt.1")] == ["mine 0", "mine 1"]


@pytest.mark.parametrize("name", [".draft-step-00000004", ".stale-step-00000004"])
def test_a_file_that_is_called_like_a_draft_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    remove_all(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_draft_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metadata.json").write_text("{}")
    (tmp_path / ".draft-step-00000004").symlink_to(tmp_path / "mine")
    remove_all(tmp_path)
    with pytest.raises(UnsavedCheckpointError, match="File exists"):
        write(tmp_path, 4)
    assert (tmp_path / ".draft-step-00000004").is_symlink()
    assert names(tmp_path / "mine") == ["metadata.json"]
    (tmp_path / ".draft-step-00000005").write_text("mine")
    with pytest.raises(UnsavedCheckpointError, match="File exists"):
        write(tmp_path, 5)
    assert (tmp_path / ".draft-step-00000005").read_text() == "mine"
