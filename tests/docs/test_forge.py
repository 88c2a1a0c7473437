"""What a forge and an index read: forms, workflow, citation, metadata; and the example that the README names."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from docs.documents import FOLDERS, ROOT
from torch.distributed.run import get_args_parser

import moetrain
from moetrain.cli.main import main

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FINDINGS = sorted(path for path in (ROOT / "findings").glob("*.sh") if path.name != "common.sh")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_a_form_has_what_forges_demand(path: Path) -> None:
    form = read(path)
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) >= 3
    for field in form["body"]:
        assert field["type"] in ("markdown", "input", "textarea", "dropdown", "checkboxes")
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]
    assert read(path.with_name("config.yml")) == {"blank_issues_enabled": True}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_scripts_that_exist(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120
        runs = [step["run"] for step in job["steps"] if "run" in step]
        assert runs
        for script in re.findall(r"bash (\S+)", "\n".join(runs)):
            assert (ROOT / script).is_file(), script


def test_the_workflow_runs_the_oldest_and_newest_python_promised() -> None:
    tested = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    promised = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if ":: Python :: 3." in name]
    assert tested == [promised[0], promised[-1]]
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_the_workflow_tries_the_wheel_that_it_keeps() -> None:
    job = read(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["wheel"]
    steps = [step.get("run") or step["uses"].partition("@")[0] for step in job["steps"]]
    assert steps == ["actions/checkout", "actions/setup-python", "bash launch/wheel.sh", "actions/upload-artifact"]
    assert job["steps"][-1]["with"]["path"] == "dist/"
    assert f">={job['steps'][1]['with']['python-version']}" == PROJECT["requires-python"]


def test_one_version_and_one_licence() -> None:
    citation = read(ROOT / "CITATION.cff")
    version = moetrain.__version__  # written there alone; the metadata is read from it
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    assert TOOLS["setuptools"]["dynamic"]["version"] == {"attr": "moetrain.__version__"}
    assert citation["version"] == version
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
    assert f"call themselves {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_says_what_was_guessed_and_seen_and_who_leans_on_it(path: Path) -> None:
    """The scripts themselves need an index and minutes: they are run by hand."""
    text = path.read_text()
    head = re.split(r"^[^#]", text, maxsplit=1, flags=re.MULTILINE)[0]
    assert re.search(r"^# Guess: .*^# Seen:  .*^# Here:  ", head, re.MULTILINE | re.DOTALL)
    named = re.findall(rf"(?:{'|'.join(FOLDERS)})/[\w./]*\w/?|setup\.py", head.partition("# Here: ")[2])
    assert named, "names no file of this repository"
    assert [name for name in named if not (ROOT / name).exists()] == []
    installed = re.findall(r"^install (.*)", text.replace("\\\n", " "), re.MULTILINE)
    assert len(installed) == 1
    assert all("==" in package for package in installed[0].split())
    assert "moetrain" not in text.replace(head, ""), "a finding shows itself without moetrain"


def test_no_option_of_training_is_one_that_torchrun_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """See findings/torchrun_takes_script_options.sh."""
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    main(["train", "--help"])
    ours = re.findall(r"^ *(--[a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE)
    assert {"--preset", "--model.width", "--run-dir"} <= set(ours)
    assert len(ours) > 80
    assert [mine for mine in ours if mine not in theirs and any(name.startswith(mine) for name in theirs)] == []
    assert any(name.startswith("--log") for name in theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_example_of_the_kernels_alone_runs(dtype: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / "examples" / "expert_mlp.py"), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    difference = float(re.findall(r"by (\S+) of their largest", done.stdout)[0])
    assert 0 < difference < {"bfloat16": 5e-2, "float32": 1e-5, "float64": 1e-12}[dtype]


def test_the_example_notices_a_wrong_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "launch" / "examples" / "expert_mlp.py"))
    names = example["main"].__globals__
    monkeypatch.setattr(sys, "argv", ["expert_mlp.py", "--tokens", "64"])
    monkeypatch.setitem(names, "moe_by_loop", lambda *args: 1.001 * example["moe_by_loop"](*args))
    with torch.random.fork_rng(), pytest.raises(SystemExit) as end:
        names["main"]()
    assert end.value.code == 1
    assert "differ from a loop's by 2.0e-03" in capsys.readouterr().out
