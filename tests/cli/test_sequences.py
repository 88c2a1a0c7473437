"""``moetrain sequences``: what it draws and writes of a plan, and what it refuses."""

import json
from pathlib import Path

import pytest

from moetrain.cli.main import main

ITEM = {"gid", "round", "sequences", "ranks", "begin_ms", "ms"}


def test_it_draws_and_writes_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "plan.json"
    options = ["--lengths", "byted", "--ranks", "16", "--block", "4", "--context", "65536", "--seed", "3"]
    assert main(["sequences", *options, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    written = json.loads(out.read_text())
    lines = [line for line in text.splitlines() if line.startswith("  rank")]
    assert len(lines) == 16
    assert f"{written['makespan_ms'] / written['lower_bound_ms']:.3f} times the least" in text
    assert sum(written["tokens_per_rank"]) == 4 * 16 * 8192
    sequences = [i for item in written["items"] for i in item["sequences"]]
    assert sorted(sequences) == list(range(len(sequences)))
    assert all(item.keys() == ITEM for item in written["items"])
    gangs = [item for item in written["items"] if len(item["ranks"]) > 1]
    assert gangs
    # A gang's lanes show the same capital letter in the same columns.
    longest = max(gangs, key=lambda item: item["ms"])
    of_lanes = [{at for at, letter in enumerate(lines[rank]) if letter.isupper()} for rank in longest["ranks"]]
    assert set.intersection(*of_lanes)
    end = max(item["begin_ms"] + item["ms"] for item in written["items"])
    assert end <= written["makespan_ms"] * (1 + 1e-9)


def test_lengths_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lengths").write_text("40\n9\n\n12 3\n")
    out = tmp_path / "plan.json"
    options = ["--lengths", str(tmp_path / "lengths"), "--ranks", "2", "--capacity", "24", "--planner", "context"]
    assert main(["sequences", *options, "--cp", "2", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [(item["round"], item["sequences"], item["ranks"]) for item in written["items"]] == [
        (0, [0], [0, 1]),
        (1, [1, 2, 3], [0, 1]),
    ]
    assert "4 sequences of 64 tokens on 2 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--lengths", "github", "--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--lengths", "github", "--ranks", "4", "--block", "3"], "--block (3) must divide --ranks (4)"),
        (["--lengths", "nowhere", "--ranks", "4"], "--lengths"),
        (["--lengths", "WORDS", "--ranks", "4"], "it must hold numbers of at least 1, got 'four'"),
        (
            ["--lengths", "github", "--ranks", "4", "--capacity", "99"],
            "that may share it under planner moetrain",
        ),
        (["--lengths", "github", "--ranks", "4", "--planner", "data"], "the 1 rank(s) that may share it"),
    ],
)
def test_what_it_refuses(options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words").write_text("1 four")
    given = [str(tmp_path / "words") if option == "WORDS" else option for option in options]
    assert main(["sequences", *given]) == 2
    assert text in capsys.readouterr().err
