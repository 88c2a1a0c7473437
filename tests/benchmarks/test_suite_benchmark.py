"""bench_suite.py on stand-ins for two checkouts, whose suites take known times."""

import json
import subprocess
import sys
from pathlib import Path

import bench_suite

SCRIPT = Path(bench_suite.__file__)


def checkout(folder: Path, suite: str) -> Path:
    (folder / "launch").mkdir(parents=True)
    (folder / ".venv").mkdir()
    (folder / ".mypy_cache").mkdir()
    (folder / "launch/test.sh").write_text(f"[[ ! -e .mypy_cache ]] || exit 9\n{suite}\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "--quiet"], ["add", "launch"], [*identity, "commit", "--quiet", "-m", "a version"]):
        subprocess.run(["git", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_checkouts_take_turns_and_the_ratio_is_newer_over_older(tmp_path: Path) -> None:
    older = checkout(tmp_path / "older", 'echo older >>../log; sleep 1; echo "== 7 passed, 1 skipped in 1 s =="')
    newer = checkout(tmp_path / "newer", 'echo newer >>../log; echo "= 5 passed ="; echo "= 4 passed ="')
    out = tmp_path / "out.json"
    done = run(older, newer, "--rounds", 2, "--json", out)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text().split() == ["older", "newer", "newer", "older"]
    written = json.loads(out.read_text())
    assert 0 < written["suite_ratio"] < 1
    assert [turn["passed"] for name in ("older", "newer") for turn in written["turns"][name]] == [7, 7, 9, 9]
    assert written["commits"]["older"] != written["commits"]["newer"]


def test_a_suite_that_fails_is_no_time(tmp_path: Path) -> None:
    suites = {"older": "echo 'it broke'; exit 1", "newer": "true"}
    older, newer = (checkout(tmp_path / name, suite) for name, suite in suites.items())
    done = run(older, newer, "--json", tmp_path / "x")
    assert done.returncode == 1
    assert "it broke\n\nbench_suite: bash launch/test.sh failed in" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_not_set_up_is_refused(tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    done = run(tmp_path / "older", tmp_path / "older")
    assert done.returncode == 2
    assert "is not set up: it has no .venv" in done.stderr
