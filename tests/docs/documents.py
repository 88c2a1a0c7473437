"""Reads what the documents promise: links, paths, options, commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from moetrain.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "findings/*.md", "benchmarks/*.md", "csrc/**/*.md", ".github/*.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = ("moetrain", "csrc", "tests", "benchmarks", "launch", "docs", "findings", "docker")
OF_A_RUN = ("--preset", "--config", "--run-dir", "--seed")
PLACEHOLDER = re.compile(r"(?<![A-Za-z])(X|NAME|SCRIPT)(?=[._/]|$)")


@dataclass(frozen=True, slots=True)
class Promise:
    """A piece of a document that must hold."""

    document: Path
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}: {self.text}"


def blocks(text: str) -> Iterator[str]:
    """Blocks of code, fenced or indented, and what is left is prose."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()
        else:
            yield ""


def prose(text: str) -> str:
    """The text without its blocks of code."""
    kept, fenced = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            kept.append(line)
    return "\n".join(kept)


def links(document: Path) -> list[Promise]:
    """Targets inside the repository."""
    text = prose(document.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"]+)\"", text)
    return [Promise(document, target) for target in targets if not re.match(r"[a-z]+:", target)]


def headings(document: Path) -> set[str]:
    """Anchors of a document's headings, as forges make them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken(link: Promise) -> str | None:
    """Why a link leads nowhere, or None."""
    target, _, anchor = link.text.partition("#")
    path = (link.document.parent / target).resolve() if target else link.document
    if not path.exists():
        return f"{link}: there is no {target}"
    if not path.is_relative_to(ROOT):
        return f"{link}: leads out of the repository"
    if anchor and anchor not in headings(path):
        return f"{link}: {path.name} has no heading #{anchor}"
    return None


def quoted(document: Path) -> list[str]:
    """What stands between backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(document.read_text()))


def named_paths(document: Path) -> list[Promise]:
    """Files and folders of the repository that the prose names; ``*`` stands for any."""
    pattern = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*")
    found = [text for text in quoted(document) if pattern.fullmatch(text) and not PLACEHOLDER.search(text)]
    return [Promise(document, text) for text in found]


def option_names() -> set[str]:
    """``moe.top_k`` and all other dotted fields of a run."""
    return {f"{table}.{field}" for table, names in _tables().items() for field in names}


def _tables() -> dict[str, set[str]]:
    hints = get_type_hints(RunConfig)
    return {
        field.name: {inner.name for inner in fields(hints[field.name])}
        for field in fields(RunConfig)
        if is_dataclass(hints[field.name])
    }


def named_options(document: Path) -> list[Promise]:
    """Fields of a run's configuration that the prose names."""
    pattern = re.compile(rf"(?:{'|'.join(_tables())})\.[a-z_]+")
    return [
        Promise(document, match.group())
        for text in quoted(document)
        if (match := re.match(pattern, text)) and match.end() in (len(text), text.find(" "))
    ]


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a document: the program, what it is given, and options by name."""

    promise: Promise
    words: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        """``--name`` of each, without what follows ``--`` alone."""
        words = self.words[: self.words.index("--")] if "--" in self.words else self.words
        return [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]


def commands(document: Path) -> list[Command]:
    """Every command in the document's blocks of code and between its backticks."""
    found: list[Command] = []
    joined = re.sub(r"\\\n\s*", " ", "\n".join(blocks(document.read_text())))
    for line in [*joined.splitlines(), *quoted(document)]:
        for part in re.split(r"\s&&\s", line.partition("  #")[0].partition(" # ")[0]):
            try:
                words = shlex.split(part)
            except ValueError:
                continue
            while words and (re.fullmatch(r"[A-Z_]+=.*", words[0]) or words[0] == "time"):
                words = words[1:]
            if words and _is_command(words):
                found.append(Command(Promise(document, part.strip()), tuple(words)))
    return found


def _is_command(words: list[str]) -> bool:
    if any(PLACEHOLDER.search(word) for word in words[1:2]):
        return False
    if words[0] in ("moetrain", "torchrun"):
        return len(words) > 1
    return words[0] in ("bash", "python", "compute-sanitizer") and any("/" in word for word in words[1:3])
