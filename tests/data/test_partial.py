"""What preparations that were killed have left is cleared, and nothing of anybody else's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data.folders import hidden

from moetrain.data.manifest import Manifest
from moetrain.data.partial import clear_left_over, move_into_place, partial_folder
from moetrain.data.prep import prepare
from moetrain.data.sources import Source


def test_killed_preparation_is_no_dataset(tmp_path: Path, sources: list[Source]) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from moetrain.data.manifest import Manifest; from moetrain.data.prep import prepare\n"
        "from moetrain.data.sources import Source\n"
        "Manifest.write = lambda self, folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare([Source(name='odd', path=Path(sys.argv[1]))], Path(sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", program, str(sources[0].path), str(tmp_path / "out")]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = hidden(tmp_path)
    assert left.name.startswith(".out.partial-")
    with pytest.raises(ValueError, match="no prepared dataset at"):
        Manifest.read(left)
    lines: list[str] = []
    assert prepare(sources, tmp_path / "out", report=lines.append) == Manifest.read(tmp_path / "out")
    assert lines[0] == f"removed {left}, which a preparation that was killed had left"
    assert hidden(tmp_path) == []


def test_what_another_preparation_is_writing_stays(tmp_path: Path, sources: list[Source]) -> None:
    """Two at once, of different datasets to one place: the second neither clears the first's folder nor is replaced."""
    place = tmp_path / "out"
    with partial_folder(place) as first:
        (first / "half.train.bin").write_text("of a dataset")
        assert clear_left_over(place) == []
        second = prepare(sources, place)
        assert (first / "half.train.bin").read_text() == "of a dataset"
        with pytest.raises(ValueError, match="appeared while it was being prepared"):
            move_into_place(first, place, replace=False)
        assert Manifest.read(place) == second
    assert hidden(tmp_path) == []


def test_a_replacement_that_was_killed_puts_the_dataset_back(tmp_path: Path, sources: list[Source]) -> None:
    """It is moved aside for a moment; what is killed then must not cost it."""
    before = prepare(sources, tmp_path / "out")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from moetrain.data.prep import prepare; from moetrain.data.sources import Source\n"
        "rename = Path.rename\n"
        "def killed(path, target):\n"
        "    rename(path, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.rename = killed\n"
        "prepare([Source(name='odd', path=Path(sys.argv[1]))], Path(sys.argv[2]), overwrite=True)\n"
    )
    arguments = [sys.executable, "-c", program, str(sources[0].path), str(tmp_path / "out")]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert sorted(path.name.split("-")[0] for path in hidden(tmp_path)) == [".out.old", ".out.partial"]
    lines: list[str] = []
    assert prepare(sources, tmp_path / "out", report=lines.append) == before
    assert lines[-1] == f"{tmp_path / 'out'} is up to date"
    assert hidden(tmp_path) == []


KILLED = "0123456789abcdef" * 2  # as a preparation calls what it makes
USERS = [  # name behind ".out.", and a file in it
    ("old-20251130", "thesis.tex"),
    ("old-20251130", "odd.train.bin"),  # a copy of a dataset, by hand
    ("partial-my_notes", "monday.txt"),
    ("partial-abcdefgh", "odd.train.bin"),
    ("partial-abcdefgh", "odd.train.idx"),
    ("partial-abcdefgh", "manifest.json"),
    ("partial-abcdefgh", ".odd.train.bin.PID.partial"),  # being written
    ("partial-abcdefgh", ".odd.train.bin.0.partial"),
    (f"partial-{KILLED}", "thesis.tex"),
    (f"partial-{KILLED}", "plots/odd.train.bin"),
    (f"partial-{KILLED}", "odd.train.bin/thesis.tex"),
    (f"partial-{KILLED}", "manifest.json"),  # of another program
    (f"old-{KILLED}", "thesis.tex"),
    (f"old-{KILLED}", "odd.train.bin"),  # without a manifest that names it
]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(("name", "file"), USERS)
def test_folders_of_the_users_are_not_cleared(
    name: str, file: str, is_there: bool, tmp_path: Path, sources: list[Source]
) -> None:
    """Whatever they are called: what is in them decides."""
    if is_there:
        prepare(sources[:1], tmp_path / "out")
    mine = tmp_path / f".out.{name}" / file.replace("PID", str(os.getpid()))
    mine.parent.mkdir(parents=True)
    mine.write_text('{"years": 5}')
    lines: list[str] = []
    made = prepare(sources, tmp_path / "out", overwrite=is_there, report=lines.append)
    assert mine.read_text() == '{"years": 5}'
    assert Manifest.read(tmp_path / "out") == made
    assert not [line for line in lines if line.startswith("removed")]
    assert hidden(tmp_path) == [tmp_path / f".out.{name}"]


def test_a_killed_preparation_is_cleared_and_nothing_beside_it(tmp_path: Path, sources: list[Source]) -> None:
    left, noted = (tmp_path / f".out.partial-{digit * 32}" for digit in "ab")
    for folder in (left, noted):
        folder.mkdir()
        for name in ("odd.train.bin", ".odd.validation.idx.4711.partial", "manifest.json"):
            (folder / name).write_text('{"format": "moetrain-dataset", "domains')  # cut short
    (noted / "notes.txt").write_text("mine")
    assert clear_left_over(tmp_path / "out") == [left]
    assert hidden(tmp_path) == [noted]
    assert len(list(noted.iterdir())) == 4


@pytest.mark.parametrize("half", [".odd.validation.bin.{0}.partial", ".even.train.idx.{0}.partial", None])
@pytest.mark.parametrize("more", [None, "notes.txt", "manifest.json", "even.train.bin", "odd.validation.idx"])
def test_what_a_killed_preparation_of_an_earlier_version_left_is_cleared(
    half: str | None, more: str | None, tmp_path: Path, sources: list[Source]
) -> None:
    """Its folders have names that a user may give: all that is in one must be known to be of a preparation."""
    prepare(sources[:1], tmp_path / "first")
    left = tmp_path / ".out.partial-a_b9c8d7"
    left.mkdir()
    for name in ("odd.train.bin", "odd.train.idx"):
        (tmp_path / "first" / name).rename(left / name)
    if half is not None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        (left / half.format(ended.pid)).write_bytes(b"half")
    if more is not None:
        (left / more).write_text('{"format": "moetrain-dataset"}')
    is_left = more is None or (more == "even.train.bin" and half is not None and half.startswith(".even.train.idx"))
    assert clear_left_over(tmp_path / "out") == ([left] if is_left else [])
    assert left.exists() != is_left


def test_what_is_put_into_a_dataset_while_it_is_replaced_stays(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(sources, tmp_path / "out")
    rename = Path.rename

    def noting(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if ".old-" in target.name:
            (target / "notes.txt").write_text("mine")
        return moved

    monkeypatch.setattr(Path, "rename", noting)
    prepare(sources[:1], tmp_path / "out", overwrite=True)
    (old,) = hidden(tmp_path)
    assert [path.name for path in old.iterdir()] == ["notes.txt"]


def test_similar_names_are_not_cleared(tmp_path: Path, sources: list[Source]) -> None:
    (tmp_path / "elsewhere").mkdir()
    partial = f"partial-{KILLED}"
    strangers = [".out.partial-mine", f".out2.{partial}", f".out.{partial}.txt", f".outX{partial}", f".out.{partial}0"]
    for name in strangers:
        (tmp_path / name).mkdir()
    (tmp_path / f".out.{partial}").write_text("a file")
    (tmp_path / f".out.old-{KILLED}").symlink_to(tmp_path / "elsewhere")
    prepare(sources, tmp_path / "out")
    assert len(hidden(tmp_path)) == len(strangers) + 2
