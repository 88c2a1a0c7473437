"""What ``--json`` names is replaced by a result, by a refusal only where it was one, and never left half written."""

import json
from pathlib import Path

import pytest

from moetrain.cli.main import main

MINE = '{"accuracy": 0.93}\n'
REFUSED = [
    ["verify", "--ranks", "0"],
    ["verify", "--no-such-option", "1"],
    ["verify", "--mesh", "dp=3", "--ranks", "2"],
    ["verify", "product", "--progress", "PROGRESS", "--shard", "3/2"],
    ["mesh", "--mesh", "dp=0"],
    ["mesh", "--mesh", "dp=2", "--draw", "PROGRESS.doc"],
]


@pytest.mark.parametrize("arguments", REFUSED)
@pytest.mark.parametrize("text", [MINE, "", "no JSON", "[]", '{"versions": {"moetrain": "0.1.0"}}'])
def test_a_refusal_replaces_no_file_of_the_users(arguments: list[str], text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    words = [word.replace("PROGRESS", str(tmp_path / "progress")) for word in arguments]
    assert main([*words, "--json", str(path)]) == 2
    assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


def test_a_refusal_replaces_an_earlier_result_of_verify(tmp_path: Path) -> None:
    """Which could be taken for that of the options that were refused."""
    path = tmp_path / "out.json"
    for wrong in (["--ranks", "0"], ["--timeout", "0"]):  # the first one writes where nothing was
        assert main(["verify", *wrong, "--json", str(path)]) == 2
        written = json.loads(path.read_text())
        assert (written["ok"], written["steps"]) == (False, [])
        assert f"{wrong[0].strip('-')}" in written["error"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--ranks", "1", "--steps", "1"],
        ["verify", "product", "--progress", "PROGRESS", "--only-summary"],
        ["mesh", "--mesh", "dp=2"],
    ],
)
def test_what_cannot_be_written_is_told_before_any_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("PROGRESS", str(tmp_path / "progress")) for word in arguments]
    assert main([*words, "--json", "/proc/x"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"moetrain {' '.join(word for word in words[:2] if word[0] != '-')}: --json must name a file that can be "
        "written, but /proc/x cannot: No such file or directory; name one in a folder of yours that has room\n"
    )


@pytest.mark.parametrize("arguments", [["verify", "product", "--progress", "PROGRESS", "--only-summary"]])
def test_a_result_that_does_not_fit_any_more_is_a_failure_in_one_sentence(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("moetrain.cli.files.write_whole", full)
    words = [word.replace("PROGRESS", str(tmp_path / "progress")) for word in arguments]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr()
    assert "to do: 22656" in said.out
    assert f"--json must name a file that can be written, but {tmp_path / 'out.json'} cannot: No space" in said.err
