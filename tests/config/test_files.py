"""Files are replaced whole, and nothing beside them is touched."""

import os
from pathlib import Path

import pytest

from moetrain.config.files import try_to_write, write_whole


def test_a_file_is_replaced_whole_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "there.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere" / "there.json")
    for path in (tmp_path / "new.json", tmp_path / "link.json"):
        write_whole(path, "text\n")
        assert path.read_text() == "text\n"
    assert (tmp_path / "link.json").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link.json", "new.json"]
    assert os.listdir(tmp_path / "elsewhere") == ["there.json"]


def test_neighbours_with_names_like_drafts_stay(tmp_path: Path) -> None:
    mine = [f".x.json.{os.getpid()}", ".x.json.draft", "x.json~"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    write_whole(tmp_path / "x.json", "text")
    try_to_write(tmp_path / "x.json")
    assert {name: (tmp_path / name).read_text() for name in mine} == dict.fromkeys(mine, "mine")
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "x.json"])


def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def full(draft: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(draft))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, "new")
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == ["x.json"]
    assert path.read_text() == "old"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try_to_write(pipe)
    write_whole(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_trying_changes_nothing_and_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old")
    try_to_write(tmp_path / "x.json")
    try_to_write(tmp_path / "y.json")
    assert os.listdir(tmp_path) == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"
    with pytest.raises(OSError, match="No such file or directory") as caught:
        try_to_write(tmp_path / "missing" / "x.json")
    assert caught.value.filename == str(tmp_path / "missing" / "x.json")
