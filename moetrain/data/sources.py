"""Folders of text on disk: which files belong to a source, which are kept, which of them validate."""

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from moetrain.config.errors import require, require_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A folder (or one file) of text that becomes one domain of a dataset.

    Attributes:
        name: of the domain; letters, digits, ``.``, ``_``, ``-``.
        path: folder, or a single file.
        patterns: shell patterns on the path below the folder; ``*`` crosses folders, so ``*.py`` finds all.
        exclude: names of folders that are not entered; hidden folders and files never are.
        max_bytes: take files in the order of a hash of their paths until this much text is reached; None takes all.
        skip_unreadable: count files that cannot be read instead of raising.
    """

    name: str
    path: Path
    patterns: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_bytes: int | None = None
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None,
            f"source name {self.name!r} must be letters, digits, '.', '_' or '-', since files are named after it",
        )
        require(
            bool(self.patterns) and all(self.patterns), f"source {self.name}: a pattern is empty; '*' takes all files"
        )
        require(
            self.max_bytes is None or self.max_bytes > 0,
            f"source {self.name}: max_bytes must be positive, got {self.max_bytes}; leave it out to take everything",
        )

    @classmethod
    def parse(cls, text: str, *, max_bytes: int | None = None) -> "Source":
        """Read ``name=path[:pattern,...]``.

        >>> Source.parse("code=no/such/src:*.py,*.md").patterns
        ('*.py', '*.md')
        """
        name, equals, rest = text.partition("=")
        require(
            bool(equals and rest),
            f"--source must be name=path[:pattern,...], got {text!r}; for example docs=./docs:*.md",
        )
        if Path(rest).exists():
            return cls(name=name, path=Path(rest), max_bytes=max_bytes)
        path, colon, patterns = rest.rpartition(":")
        if not colon:
            return cls(name=name, path=Path(rest), max_bytes=max_bytes)
        return cls(name=name, path=Path(path), patterns=tuple(patterns.split(",")), max_bytes=max_bytes)

    def files(self) -> list[tuple[str, Path]]:
        """(path below the folder, path) of every matching regular file, in the order of a hash of the former."""
        if self.path.is_file():
            return [(self.path.name, self.path)]
        if not self.path.is_dir():
            raise ValueError(f"source {self.name}: {self.path} is neither a folder nor a file; correct the path")
        found = [(name, self.path / name) for name in self._walk()]
        return sorted(
            (pair for pair in found if pair[1].is_file()), key=lambda pair: (_fraction("order", pair[0]), pair)
        )

    def read(self, path: Path) -> bytes | None:
        """Contents of one file, ``.gz`` unpacked; None where it cannot be read and that is allowed."""
        try:
            raw = path.read_bytes()
            return gzip.decompress(raw) if path.suffix == ".gz" else raw
        except (OSError, EOFError, zlib.error) as error:
            if self.skip_unreadable:
                return None
            raise ValueError(f"source {self.name}: cannot read {path}: {error}; repair or exclude the file") from error

    def _walk(self) -> Iterator[str]:
        patterns = [pattern.replace("**/", "*") for pattern in self.patterns]
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = sorted(name for name in subfolders if name[0] != "." and name not in self.exclude)
            below = Path(folder).relative_to(self.path)
            for name in names:
                relative = (below / name).as_posix()
                if name[0] != "." and any(fnmatchcase(relative, pattern) for pattern in patterns):
                    yield relative


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of one source that are kept, and how many were not, and why."""

    kept: tuple[tuple[str, Path], ...]
    empty: int
    duplicates: int
    unreadable: int


def select_files(source: Source, files: Sequence[tuple[str, Path]], seen: set[bytes]) -> Selection:
    """Drop empty files and those whose contents are in ``seen`` already; stop at the source's ``max_bytes``.

    ``seen`` holds digests of contents and is added to, so that no text occurs twice in a whole dataset.
    """
    kept: list[tuple[str, Path]] = []
    empty = duplicates = unreadable = total = 0
    for relative, path in files:
        if source.max_bytes is not None and total >= source.max_bytes:
            break
        contents = source.read(path)
        if contents is None:
            unreadable += 1
        elif not contents:
            empty += 1
        elif (digest := hashlib.sha256(contents).digest()) in seen:
            duplicates += 1
        else:
            seen.add(digest)
            kept.append((relative, path))
            total += len(contents)
    return Selection(tuple(kept), empty, duplicates, unreadable)


def split_files(names: Sequence[str], validation_fraction: float) -> frozenset[str]:
    """Which files validate: those whose path hashes below the fraction, but of two or more never none and never all."""
    require_in("validation_fraction", validation_fraction, 0.0, 1.0)
    if validation_fraction == 0.0 or len(names) < 2:
        return frozenset()
    ordered = sorted(names, key=lambda name: (_fraction("validation", name), name))
    chosen = sum(_fraction("validation", name) < validation_fraction for name in names)
    return frozenset(ordered[: min(max(chosen, 1), len(names) - 1)])


def _fraction(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on ``name`` alone; two purposes give independent numbers."""
    digest = hashlib.sha256(f"{purpose}\0{name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
