"""bench_setup.py on a stand-in for the project, whose quick start and compile take known times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_setup
import pytest
from bench_setup import Cost, Turn, environment, order, ratios

SCRIPT = Path(bench_setup.__file__)

# A compile burns CPU, twice as much for all instruction sets, nothing for what has been compiled and not touched.
SETUP_PY = """
import os, pathlib, time
kernel, made = pathlib.Path("csrc/kernel.cpp"), pathlib.Path("build/kernel.o")
assert os.environ["CCACHE_DISABLE"] == "1"
full = not made.exists()
if full or made.stat().st_mtime_ns < kernel.stat().st_mtime_ns:
    burn = {burn} * (2 if os.environ["MOETRAIN_BUILD_ISA"] == "all" else 1) * (1 if full else 0.25)
    end = time.process_time() + burn
    while time.process_time() < end: pass
    made.parent.mkdir(exist_ok=True)
    made.touch()
"""

QUICKSTART = """
[[ "$1 $2" == "--steps 2" && ! -e .venv ]] || exit 7
mkdir -p .venv/bin && ln -s {python} .venv/bin/python
echo "moetrain: installing packages"
sleep {sleep}
echo "step 1/2  loss 5.5"
sleep 0.2
{last}
"""


def commit(repository: Path, burn: float, sleep: float, last: str = 'echo "step 2/2  loss 5.4"') -> str:
    for folder in ("launch", "csrc", "moetrain"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "setup.py").write_text(SETUP_PY.format(burn=burn))
    (repository / "csrc/kernel.cpp").write_text("kernel")
    (repository / "moetrain/__init__.py").write_text("")
    quickstart = QUICKSTART.format(python=sys.executable, sleep=sleep, last=last)
    (repository / "launch/quickstart.sh").write_text(quickstart)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "-m", "a version"]):
        subprocess.run(["git", *words], cwd=repository, check=True, stdout=subprocess.DEVNULL)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=repository, text=True).strip()


def run(repository: Path, scratch: Path, *words: str) -> subprocess.CompletedProcess[str]:
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), "--repository", str(repository), "--scratch", str(scratch), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_versions_take_turns_and_ratios_are_newer_over_older(tmp_path: Path) -> None:
    older, newer = commit(tmp_path / "r", 0.2, 0.5), commit(tmp_path / "r", 0.05, 0.0)
    words = ["--older", older, "--touch", "csrc/kernel.cpp", "--json", str(tmp_path / "out.json"), "--rounds", "2"]
    done = run(tmp_path / "r", tmp_path / "scratch", *words)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[:4]] == ["older", "newer", "newer", "older"]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["commits"] == {"older": older, "newer": newer}
    assert report["machine"]["command"].startswith("python ")
    # What is slept and burnt is a lower bound on each figure; which one is larger is all that is sure.
    for name in ("first_loss_ratio", "compile_cpu_ratio", "compile_all_cpu_ratio", "rebuild_ratio"):
        assert 0 < report[name] < 1, name
    for turn in report["turns"]["older"]:
        assert turn["first_loss_seconds"] >= 0.5
        assert turn["first_loss"] == "step 1/2  loss 5.5"
        assert turn["compile"]["cpu_seconds"] >= 0.2
        assert turn["compile_all"]["cpu_seconds"] >= 0.4
        assert turn["rebuild"] == {}
    for turn in report["turns"]["newer"]:
        assert list(turn["rebuild"]) == ["csrc/kernel.cpp"]
        assert turn["rebuild"]["csrc/kernel.cpp"]["cpu_seconds"] >= 0.0125
    assert list((tmp_path / "scratch").iterdir()) == [], "clones are removed"


@pytest.mark.parametrize("last", ["exit 3", "exit 0"])
def test_a_quick_start_that_fails_ends_the_run_with_what_it_said(tmp_path: Path, last: str) -> None:
    commit(tmp_path / "r", 0.0, 0.0, last)
    if last == "exit 0":  # but shows no loss
        script = tmp_path / "r/launch/quickstart.sh"
        script.write_text(script.read_text().replace("step 1/2", "no step"))
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "x"],
                       cwd=tmp_path / "r", check=True)  # fmt: skip
    done = run(tmp_path / "r", tmp_path / "scratch", "--older", "HEAD", "--touch")
    assert done.returncode == 1
    assert "moetrain: installing packages" in done.stderr
    assert "the quick start failed or showed no loss" in done.stderr
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_commit_that_is_not_there_is_refused_before_anything_is_cloned(tmp_path: Path) -> None:
    commit(tmp_path / "r", 0.0, 0.0)
    done = run(tmp_path / "r", tmp_path / "scratch", "--older", "no-such-commit")
    assert done.returncode == 1
    assert "has no commit 'no-such-commit'" in done.stderr
    assert not list((tmp_path / "scratch").iterdir())


def test_ratios_are_of_medians_and_of_the_worst_rebuild() -> None:
    def turn(first: float, cpu: float, *rebuilds: float) -> Turn:
        costs = {str(number): Cost(seconds, 0.0) for number, seconds in enumerate(rebuilds)}
        return Turn(first, "", Cost(cpu / 2, cpu), Cost(cpu, 2 * cpu), costs)

    older, newer = [turn(100, 40), turn(500, 80), turn(110, 60)], [turn(44, 6, 1, 3), turn(30, 9, 2, 5), turn(90, 6, 4)]
    found = ratios({"older": older, "newer": newer})
    assert found == pytest.approx(
        {"first_loss_ratio": 0.4, "compile_cpu_ratio": 0.1, "compile_all_cpu_ratio": 0.1, "rebuild_ratio": 4 / 30}
    )


def test_clones_find_no_compiler_cache_and_not_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(Path(sys.prefix, "bin"))
    monkeypatch.setenv("PATH", os.pathsep.join([own, "/usr/bin"]))
    monkeypatch.setenv("CCACHE_DIR", "/somewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = environment(MOETRAIN_BUILD_ISA="all")
    assert (found["CCACHE_DISABLE"], found["MOETRAIN_COMPILER_CACHE"]) == ("1", "none")
    assert not {"CCACHE_DIR", "PYTHONPATH", "VIRTUAL_ENV"} & set(found)
    assert found["MOETRAIN_BUILD_ISA"] == "all"
    if sys.prefix != sys.base_prefix:
        assert found["PATH"] == "/usr/bin"


def test_who_comes_first_changes() -> None:
    assert [order(number)[0] for number in range(4)] == ["older", "newer", "older", "newer"]


def test_kernels_that_are_touched_are_there() -> None:
    assert [kernel for kernel in bench_setup.TOUCHED if not (bench_setup.ROOT / kernel).is_file()] == []
