"""A checkpoint's folder may hold a user's own files: those outlive whatever is done to the checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import UnsavedCheckpointError
from moetrain.checkpoint.folder import find_latest, verify
from moetrain.checkpoint.names import MANIFEST, list_checkpoints, own_files, remove_all
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


FOREIGN = {
    "another program's": {"metadata.json": b'{"by": "my own trainer"}\n', "model.safetensors": b"w"},
    "with a data file called as ours": {"metadata.json": b'{"by": "me"}', "data-00000.safetensors": b"mine"},
    "a list": {"metadata.json": b"[1, 2]", "data-00000.safetensors": b"mine"},
    "a checksum of its own": {"metadata.json": b'{"sha256": "00", "file": "model.pt"}', "model.pt": b"w"},
    "a note on ours": {"metadata.json": b'{"from": "a moetrain-checkpoint"}', "model.pt": b"w"},
    "no JSON": {"metadata.json": b"by: my own trainer", "data-00000.safetensors": b"mine"},
    "data alone": {"data-00000.safetensors": b"\x20\0\0\0\0\0\0\0" + b'{"weight":{"dtype":"F32","shape":[]'},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_programs_checkpoint_is_none_of_ours(name: str, tmp_path: Path) -> None:
    """Told by what is in its files: it is not listed, not removed and not replaced, wherever it lies."""
    files = {f"step-00000003/{file}": text for file, text in FOREIGN[name].items()}
    (tmp_path / "step-00000003").mkdir()
    for file, text in files.items():
        (tmp_path / file).write_bytes(text)
    assert list_checkpoints(tmp_path) == []
    remove_all(tmp_path)
    save(tmp_path, 4, {"a": LogicalTensor.whole(FULL)}, {}, keep=1)
    assert {file: (tmp_path / file).read_bytes() for file in files} == files
    (tmp_path / "step-00000003").rename(tmp_path / ".stale-step-00000004")
    write(tmp_path, 4)
    found = [path.read_bytes() for path in (tmp_path / "step-00000004").iterdir()]
    assert all(text in found for text in files.values())
    assert find_latest(tmp_path) == tmp_path / "step-00000004"


def test_a_draft_with_another_programs_manifest_keeps_it(tmp_path: Path) -> None:
    (tmp_path / ".draft-step-00000004").mkdir()
    for name, text in FOREIGN["with a data file called as ours"].items():
        (tmp_path / ".draft-step-00000004" / name).write_bytes(text)
    path = write(tmp_path, 4)
    assert verify(path).step == 4
    for name, text in FOREIGN["with a data file called as ours"].items():
        assert (path / f"{name}.1").read_bytes() == text


def _cut(text: bytes) -> bytes:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    ("manifest", "with_data"),
    [(_cut, True), (_cut, False), (lambda text: b"", True), (lambda text: b"{}", True), (lambda text: None, True)],
)
def test_a_damaged_checkpoint_is_one_of_ours(
    manifest: Callable[[bytes], bytes | None], with_data: bool, tmp_path: Path
) -> None:
    path = write(tmp_path, 4)
    text = manifest((path / MANIFEST).read_bytes())
    (path / MANIFEST).unlink() if text is None else (path / MANIFEST).write_bytes(text)
    if not with_data:
        (path / "data-00000.safetensors").unlink()
    assert list_checkpoints(tmp_path) == [path]
    assert find_latest(tmp_path) is None
    remove_all(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_damaged_bit_of_a_manifest_makes_its_checkpoint_a_strangers(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    clean = (path / MANIFEST).read_bytes()
    for position in range(len(clean)):
        damaged = bytearray(clean)
        damaged[position] ^= 1 << position % 8
        (path / MANIFEST).write_bytes(damaged)
        assert list_checkpoints(tmp_path) == [path], position
