"""A command does its work whether or not somebody reads what it says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moetrain.data.manifest import Manifest
from moetrain.data.prep import prepare
from moetrain.data.sources import Source


@contextmanager
def closed_pipe() -> Iterator[int]:
    """The end of a pipe that is written to; nobody has the other one."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


def run(*arguments: str, stdout: int, stderr: int = subprocess.PIPE, **environment: str) -> tuple[int, str]:
    """Exit code and standard error, where that is read."""
    command = [sys.executable, "-m", "moetrain", *arguments]
    done = subprocess.run(command, stdout=stdout, stderr=stderr, env={**os.environ, **environment}, timeout=200)
    return done.returncode, (done.stderr or b"").decode()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / name).write_text(f"{name} word after word " * 40)
    return tmp_path / "text"


def test_training_goes_on_to_its_end_when_its_output_is_closed(text: Path, tmp_path: Path) -> None:
    prepare([Source(name="words", path=text)], tmp_path / "corpus")
    options = ["--preset", "tiny", "--steps", "3", "--data.path", str(tmp_path / "corpus"), "--data.seq-len", "16"]
    with closed_pipe() as nobody:
        code, _ = run("train", *options, "--run-dir", str(tmp_path / "run"), stdout=nobody, stderr=nobody)
    assert code == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 3]  # and the last evaluation
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_a_dataset_is_made_when_output_is_closed(text: Path, tmp_path: Path) -> None:
    with closed_pipe() as nobody:
        done = run("prep", "--source", f"words={text}", "--out", str(tmp_path / "out"), stdout=nobody)
    assert done == (0, "")
    assert Manifest.read(tmp_path / "out").domains["words"].train.documents == 1


@pytest.mark.parametrize("arguments", [["mesh", "--mesh", "dp=4"], ["--help"]])
def test_output_that_nobody_reads_is_no_failure(arguments: list[str]) -> None:
    with closed_pipe() as nobody:
        assert run(*arguments, stdout=nobody) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("arguments", "who"), [(["mesh", "--mesh", "dp=4"], "mesh"), ([], "moetrain")])
def test_output_that_does_not_fit_is_a_failure(arguments: list[str], who: str) -> None:
    with open("/dev/full", "w") as full:
        code, err = run(*arguments, stdout=full.fileno())
    assert (code, err) == (1, f"moetrain: what {who} says could not be written: No space left on device\n")


def test_a_terminal_that_lacks_a_character_gets_an_escape(text: Path, tmp_path: Path) -> None:
    code = run("prep", "--source", f"words={text}", "--out", str(tmp_path / "ä"), stdout=2, PYTHONIOENCODING="ascii")[0]
    assert code == 0
    assert Manifest.read(tmp_path / "ä").domains["words"].train.documents == 1
