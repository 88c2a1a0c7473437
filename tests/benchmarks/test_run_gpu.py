"""What run_gpu.sh does, with a stand-in for Python that writes down what it is asked to run."""

import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
STAGES = "build,smoke,test,sanitize,ring,ops,experts,peers,rounding,step,train"


class Rehearsal:
    """One call; ``fails`` is what a command must contain for the stand-in to fail, ``saved`` what is in its results."""

    def __init__(self, folder: Path, *options: str, fails: str = "no command", saved: tuple[str, ...] = ()) -> None:
        log, python, out = folder / "log", folder / "python", folder / "out"
        out.mkdir()
        for stem in saved:
            (out / f"{stem}_{time.strftime('%Y%m')}.json").write_text("{}")
        python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *"{fails}"*) exit 3 ;; esac\n')
        python.chmod(0o755)
        command = ["bash", str(SCRIPT), "--rehearse", "--python", str(python), "--out", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        self.code, self.output, self.errors = done.returncode, done.stdout, done.stderr
        self.commands = [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []

    @property
    def scripts(self) -> list[str]:
        return [command[0] for command in self.commands if command[0].startswith("benchmarks/")]


def test_every_stage_runs_scripts_that_exist(tmp_path: Path) -> None:
    run = Rehearsal(tmp_path, saved=("experts_rehearsal", "experts_rehearsal-peers"))
    assert re.findall(r"^== (\w+)$", run.output, re.MULTILINE) == STAGES.split(",")
    assert len(run.scripts) == len(set(run.scripts)) + 3  # smoke, sanitize; experts, peers; two pictures
    assert all((ROOT / script).is_file() for script in run.scripts)
    assert run.code == 1
    assert "1 stages failed: train" in run.output, "a training that left no summary is a failure"


def test_a_stage_that_fails_stops_no_other(tmp_path: Path) -> None:
    run = Rehearsal(tmp_path, "--stages", "smoke,ops,experts,step", fails="bench_routing_ops")
    assert run.code == 1
    assert "== ops: FAILED" in run.output
    assert {"benchmarks/bench_row_ops.py", "benchmarks/bench_step.py"} <= set(run.scripts)


@pytest.mark.parametrize("saved", [(), ("experts_rehearsal",)])
def test_a_shape_left_out_costs_no_picture(tmp_path: Path, saved: tuple[str, ...]) -> None:
    run = Rehearsal(tmp_path, "--stages", "experts", fails="bench_experts", saved=saved)
    assert run.code == 1
    assert ("benchmarks/figures.py" in run.scripts) is bool(saved)


def test_results_go_where_they_were_asked_for(tmp_path: Path) -> None:
    run = Rehearsal(tmp_path, "--stages", "step,experts")
    (step,) = (command for command in run.commands if command[0] == "benchmarks/bench_step.py")
    assert step[-1].startswith(str(tmp_path / "out" / "step_rehearsal_"))
    assert (tmp_path / "out" / "gpu_experts.log").exists()


def test_limits_leave_some_of_eight_minutes() -> None:
    seconds = dict(re.findall(r"(\w+)\) echo (\d+) ;;", SCRIPT.read_text()))
    assert list(seconds) == STAGES.split(",")
    assert sum(map(int, seconds.values())) <= 460


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--stages", "experts,expert"), f"unknown stage 'expert'; stages are {STAGES.replace(',', ', ')}."),
        (("--stage", "x"), "unknown option '--stage'; see bash benchmarks/run_gpu.sh --help."),
        (("--stages",), "--stages needs a value; see --help."),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: tuple[str, ...], text: str) -> None:
    run = Rehearsal(tmp_path, *options)
    assert (run.code, run.commands) == (2, [])
    assert run.errors == f"moetrain: {text}\n"
