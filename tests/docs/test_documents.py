"""What the documents promise exists: links, paths, options, commands and their options."""

import re
import runpy
from pathlib import Path

import pytest
from docs.documents import (
    DOCUMENTS,
    OF_A_RUN,
    ROOT,
    Command,
    Promise,
    broken,
    commands,
    links,
    named_options,
    named_paths,
    option_names,
)

from moetrain.cli.main import COMMANDS, main
from moetrain.config import load_run

BY_NAME = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_documents_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "docs/README.md", "csrc/cuda/README.md", "findings/README.md"} <= names
    assert sum(len(links(path)) for path in DOCUMENTS) > 50
    assert sum(len(commands(path)) for path in DOCUMENTS) > 40
    assert sum(len(named_paths(path)) for path in DOCUMENTS) > 50


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1097, "half of what it was; the rest belongs in docs/"


@BY_NAME
def test_links_lead_somewhere(document: Path) -> None:
    assert [text for link in links(document) if (text := broken(link))] == []


BUILT = "moetrain/_C.abi3.so"  # not where launch/test.sh --torch alone has run


@BY_NAME
def test_paths_exist(document: Path) -> None:
    named = [path for path in named_paths(document) if path.text != BUILT]
    assert [str(path) for path in named if not any(ROOT.glob(path.text.rstrip("/")))] == []


@BY_NAME
def test_options_of_a_run_exist(document: Path) -> None:
    assert [str(option) for option in named_options(document) if option.text not in option_names()] == []


@BY_NAME
def test_commands_exist(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [text for command in commands(document) if (text := wrong(command, capsys))] == []


def test_one_page_alone_says_what_has_run_on_a_gpu() -> None:
    """So that a row of one table goes when its check has run, and no comment elsewhere stays wrong."""
    claim = re.compile(
        r"(?:never|not(?: yet)?|nothing|none|no kernel)[^.|]{0,40} run[\s/#*]+on[\s/#*]+(?:a[\s/#*]+GPU|one\b)",
        re.IGNORECASE,
    )
    folders = ("moetrain", "csrc", "tests", "benchmarks", "launch")
    sources = [
        path
        for folder in folders
        for ending in ("py", "h", "cuh", "cu", "cpp", "sh", "md")
        for path in (ROOT / folder).rglob(f"*.{ending}")
    ]
    assert len(sources) > 300
    assert claim.search("Never run on a\n// GPU so far.")
    assert [
        str(path.relative_to(ROOT)) for path in sources if path != Path(__file__) and claim.search(path.read_text())
    ] == []
    assert claim.search((ROOT / "docs" / "gpu-status.md").read_text())


def test_every_page_of_docs_is_in_the_index() -> None:
    index = {(ROOT / "docs" / link.text).resolve() for link in links(ROOT / "docs" / "README.md")}
    assert {path for path in DOCUMENTS if path.parent == ROOT / "docs"} - index == {ROOT / "docs" / "README.md"}


def test_the_api_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "api.py"))["page"]
    assert (ROOT / "docs" / "api.md").read_text() == page(), "run: python docs/api.py"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bash launch/test.sh --no-lint -- tests/placement -x", None),
        ("bash launch/tset.sh", "there is no launch/tset.sh"),
        ("bash launch/test.sh --nolint", "launch/test.sh knows no --nolint"),
        ("python benchmarks/bench_experts.py --shape cpu-fine", None),
        ("python benchmarks/bench_experts.py --shapes cpu-fine", "benchmarks/bench_experts.py knows no --shapes"),
        ("torchrun --standalone benchmarks/bench_step.py --preset quickstart --mesh.ep 2", None),
        ("torchrun --standalone benchmarks/bench_step.py --mesh.pe 2", "benchmarks/bench_step.py knows no --mesh.pe"),
        ("moetrain verify --ranks 8", None),
        ("moetrain verify --rank 8", "moetrain verify knows no --rank"),
        ("moetrain trian", "no command moetrain trian"),
        ("torchrun --standalone -m moetrain train --preset quickstart --train.steps 100", None),
        ("torchrun --standalone -m moetrain train --preset quickstart --train.step 10", "train.step"),
    ],
)
def test_wrong_commands_are_noticed(text: str, complaint: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    said = wrong(Command(Promise(ROOT / "README.md", text), tuple(text.split())), capsys)
    assert said is None if complaint is None else said is not None and complaint in said


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("docs/limits.md", None),
        ("docs/limits.md#gpus", None),
        ("docs/limits.md#gpu", "limits.md has no heading #gpu"),
        ("docs/limit.md", "there is no docs/limit.md"),
        ("../moetrain.md", "there is no ../moetrain.md"),
        ("..", "leads out of the repository"),
    ],
)
def test_broken_links_are_noticed(target: str, complaint: str | None) -> None:
    said = broken(Promise(ROOT / "README.md", target))
    assert said is None if complaint is None else said is not None and complaint in said


def wrong(command: Command, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Why a command of a document cannot be run as it stands, or None."""
    words = list(command.words)
    if "moetrain" in words:
        return _wrong_subcommand(words[words.index("moetrain") + 1 :], capsys)
    script = next((word for word in words if word.endswith((".py", ".sh"))), None)
    if script is None:
        return f"{command.promise}: names no script"
    if not (ROOT / script).is_file():
        return f"{command.promise}: there is no {script}"
    told = Command(command.promise, tuple(words[words.index(script) + 1 :])).options
    source = _source(ROOT / script)
    known = (
        {*OF_A_RUN, *(f"--{name}" for name in option_names())}
        if "load_run" in source or "RunConfig" in source
        else set()
    )
    unknown = [option for option in told if f'"{option}"' not in source and f" {option}" not in source]
    unknown = [option for option in unknown if option.replace("-", "_").replace("__", "--", 1) not in known]
    return f"{command.promise}: {script} knows no {', '.join(unknown)}" if unknown else None


def _source(script: Path) -> str:
    """The script's text, and that of the files beside it that it imports."""
    text = script.read_text()
    beside = {script.with_name(f"{name}.py") for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)}
    return "\n".join([text, *(path.read_text() for path in sorted(beside) if path.is_file())])


def _wrong_subcommand(words: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    if words[0].startswith("-"):
        return None
    if words[0] not in COMMANDS:
        return f"no command moetrain {words[0]}" if words[0].isalpha() and words[0].islower() else None
    if words[0] == "train" and "--help" not in words:
        try:
            load_run(words[1:])
        except (ValueError, OSError) as error:
            return str(error)
        return None
    name = words[:2] if words[1:2] == ["product"] else words[:1]
    text = _help_of(name, capsys)
    told = Command(Promise(ROOT, " ".join(words)), tuple(words)).options
    unknown = [
        option
        for option in told
        if option != "--help" and f"{option} " not in f"{text} ".replace(",", " ").replace("]", " ")
    ]
    return f"moetrain {' '.join(name)} knows no {', '.join(unknown)}" if unknown else None


def _help_of(name: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        raise SystemExit(main([*name, "--help"]))
    return " ".join(capsys.readouterr().out.split())
