"""``moetrain placement``: what it says of a trace, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moetrain.cli.main import main
from moetrain.cost.step_costs import UNMEASURED
from moetrain.placement.trace import Trace, TraceFacts

EXPERTS, SOURCES = 8, 4


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Six steps, one layer; two experts that one group owns are hot."""
    random = np.random.default_rng(0)
    count = random.integers(10, 20, (6, 1, SOURCES, EXPERTS)).astype(np.int32)
    count[..., :2] += 100
    Trace(count, 1, (1,), TraceFacts(groups_per_node=2)).save(tmp_path / "x.npz")
    return tmp_path / "x.npz"


def test_it_tells_planners_apart(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.json"
    assert main(["placement", "--trace", str(trace), "--slots", "1", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "steps 1 to 6, 1 layer(s) of 8 experts, on 4 group(s) on 2 node(s), 1 slot(s)" in text
    assert "Costs: guessed: nothing was measured." in text
    written = json.loads(out.read_text())
    assert (written["steps"], written["nodes"], written["costs"]) == ([1, 6], 2, UNMEASURED.to_dict())
    found = {one["planner"]: one for one in written["planners"]}
    assert list(found) == ["static", "hecate", "moetrain", "full"]
    assert found["static"]["load_next"] > 2
    assert found["moetrain"]["load_next"] < 1.2
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert f"{found['moetrain']['load_next']:.3f}" in rows["moetrain"]
    assert f"{found['moetrain']['step_ratio']:.3f}" in rows["moetrain"]


def test_another_cluster_and_one_planner(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = ["--planner", "full", "--groups", "8", "--nodes", "8", "--predictor", "mean"]
    assert main(["placement", "--trace", str(trace), *options, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert (written["groups"], written["nodes"], written["predictor"]) == (8, 8, "mean")
    assert [one["planner"] for one in written["planners"]] == ["full"]
    assert 1 <= written["planners"][0]["load_next"] < 1.05, "everybody serves itself"
    assert written["planners"][0]["far_rows"] == 0


def test_costs_are_those_given_else_those_measured(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, given = (replace(UNMEASURED, pair_s=seconds) for seconds in (0.25, 0.5))
    loaded = Trace.load(trace)
    replace(loaded, facts=replace(loaded.facts, costs=measured.to_dict())).save(tmp_path / "measured.npz")
    (tmp_path / "costs.json").write_text(json.dumps(given.to_dict()))
    out = tmp_path / "out.json"
    for options, costs, said in (
        ([], measured, "measured by the trace's run"),
        (["--costs", str(tmp_path / "costs.json")], given, f"of {tmp_path / 'costs.json'}"),
    ):
        assert main(["placement", "--trace", str(tmp_path / "measured.npz"), *options, "--json", str(out)]) == 0
        written = json.loads(out.read_text())
        assert (written["costs"], written["costs_are"]) == (costs.to_dict(), said)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--planner", "hecat"], "argument --planner: invalid choice: 'hecat'"),
        (["--slots", "-1"], "--slots must be between 0 and the number of experts, 8, got -1"),
        (["--slots", "9"], "--slots must be between 0 and the number of experts, 8, got 9"),
        (["--nodes", "3"], "--nodes (3) must divide the groups (4); set --nodes to one of 1, 2, 4"),
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--groups", "0"], "--groups must be at least 1, got 0"),
        (["--groups", "6", "--nodes", "6"], "the sources of the trace (4) must divide the nodes (6)"),
        (["--move-owners-every", "-1"], "move_owners_every must be at least 0, got -1"),
        (["--costs", "/nowhere"], "--costs /nowhere must hold costs as JSON"),
        (["--trace", "/nowhere.npz"], "trace /nowhere.npz is not there; name a trace"),
        (["--json", "/"], "--json must name a file"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(
    options: list[str], text: str, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["placement", "--trace", str(trace), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert text in said.err
    assert said.err.startswith("moetrain placement: ")
    assert said.err.count("\n") == 1


def test_costs_with_other_names_are_refused(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for values in ({"pair_s": 1.0}, {**UNMEASURED.to_dict(), "pair_s": "fast"}, {**UNMEASURED.to_dict(), "pair_s": -1}):
        (tmp_path / "costs.json").write_text(json.dumps(values))
        assert main(["placement", "--trace", str(trace), "--costs", str(tmp_path / "costs.json")]) == 2
        assert "must hold costs as JSON (costs" in capsys.readouterr().err
