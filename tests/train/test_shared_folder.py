import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from train.tiny_run import make_run, used_folder

from moetrain.train import loop
from moetrain.train.run_folder import RunFolder
from moetrain.train.shared_folder import Sight, mark, not_shared, require_shared, sees
from moetrain.train.world import RefusedByAllError


def test_a_mark_is_seen_in_its_folder_alone_and_goes(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / f".shared-{'0' * 32}").write_text("")  # of runs that were killed
    (there / f".shared-{'1' * 32}").write_text("moetrain looks")
    with mark(here) as name:
        assert os.listdir(here) == [name]
        assert sees(here, name, 0.0)
        assert not sees(there, name, 0.0)
        assert not sees(tmp_path / "nowhere", name, 0.0)
        with mark(there) as other:
            assert other != name
    assert os.listdir(here) == os.listdir(there) == []


def test_what_is_called_like_a_mark_and_is_none_stays(tmp_path: Path) -> None:
    mine = {".shared-notes": "mine", ".shared-": "mine", f".shared-{'a' * 33}": "", f".shared-{'b' * 32}": "mine"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    (tmp_path / f".shared-{'c' * 32}").mkdir()
    with mark(tmp_path):
        pass
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == mine
    assert (tmp_path / f".shared-{'c' * 32}").is_dir()


def test_a_mark_that_shows_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system: the folders on the way are opened, then the mark is there."""
    opened: list[str] = []

    def open_and_show(path: Path, flags: int) -> int:
        opened.append(str(path))
        (tmp_path / "mark").write_text("")
        raise OSError("nothing to close")

    monkeypatch.setattr("moetrain.train.shared_folder.os.open", open_and_show)
    assert sees(tmp_path, "mark", 60.0)
    assert opened == [*map(str, reversed(tmp_path.parents)), str(tmp_path)]


def test_the_refusal_says_who_where_and_what_to_do() -> None:
    assert not_shared([Sight(True, "a:/r"), Sight(True, "b:/r")]) == ""
    said = not_shared([Sight(True, "a:/r"), Sight(True, "a:/r"), Sight(False, "b:/r"), Sight(False, "b:/r")])
    assert said == (
        "run_dir must be one folder that all 4 ranks share, but 2 of them do not see what rank 0 wrote to a:/r, "
        "the first of these being rank 2, which looked in b:/r; choose a --run-dir on a file system that every machine "
        "mounts at that path"
    )


def refuse_body(rank: int, folder: Path) -> str:
    require_shared(folder)  # one that both see
    with pytest.raises(RefusedByAllError) as caught:
        require_shared(folder / str(rank), within_s=0.2)
    dist.barrier()
    return str(caught.value)


@pytest.mark.dist
def test_all_ranks_refuse_a_folder_that_one_has_for_itself(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    messages = run_on_ranks(2, refuse_body, tmp_path)
    assert messages[0] == messages[1]
    assert f"{tmp_path}/0, the first of these being rank 1" in messages[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1"]


def test_a_refused_run_loses_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it may overwrite: the folder is asked about before it is opened."""
    run = make_run(corpus, tmp_path / "run")
    files = used_folder(run)

    def refuse(folder: Path) -> None:
        assert dist.is_initialized()
        raise RefusedByAllError("not shared")

    monkeypatch.setattr(loop, "require_shared", refuse)
    monkeypatch.setattr(loop, "Engine", lambda *args: pytest.fail("it went on"))
    for wanted in (run, replace(run, seed=9, train=replace(run.train, overwrite=True))):
        with pytest.raises(RefusedByAllError, match="not shared"):
            loop.train(wanted)
        assert not dist.is_initialized()
        assert (RunFolder(run.run_dir).checkpoints / "step-00000002").is_dir()
        assert {path: path.read_bytes() for path in files} == files
