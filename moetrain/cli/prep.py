"""``moetrain prep``: make a dataset of text files, or check one."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from moetrain.config.errors import require, require_storable
from moetrain.data.corpus import quickstart_sources
from moetrain.data.entropy import Entropies
from moetrain.data.manifest import Manifest
from moetrain.data.prep import prepare
from moetrain.data.sources import Source

_DESCRIPTION = """Make a dataset of text files: one domain per source, split into training and validation files.

moetrain prep --quickstart --out corpora/quickstart

moetrain prep --source code=src:*.py,*.md --source books=/data/books --out corpora/mine

moetrain prep --verify --out corpora/mine"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepOptions:
    """Options of ``moetrain prep``."""

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder that becomes the dataset."""
    source: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=PATH[:PATTERN,...]")]] = (
        field(default=())
    )
    """A domain: its name, a folder (or one file), and patterns of file names in it, such as *.txt; repeatable."""
    quickstart: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use real text that this machine has already: Python sources, manual pages, C headers, licences."""
    validation: float = 0.05
    """Share of the files that validate."""
    max_mb: float | None = None
    """At most about this much text per domain, in megabytes; None: everything (12 for --quickstart)."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a dataset that was made of other sources or options."""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only check the SHA-256 of every file of the dataset at --out."""


def main(argv: list[str]) -> int:
    """Run the command; return 0, or after a message on standard error 2 where it is refused, 1 where it failed."""
    options = tyro.cli(PrepOptions, args=argv, prog="moetrain prep", description=_DESCRIPTION)
    try:
        require_storable("--out", str(options.out))
        manifest = _verify(options) if options.verify else _prepare(options)
    except ValueError as error:
        print(f"moetrain prep: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        is_draft = ".partial-" in str(error.filename)  # a name that nobody else knows, and gone by now
        where = f" ({error.filename})" if error.filename and not is_draft else ""
        print(
            f"moetrain prep: {options.out} could not be {'checked' if options.verify else 'prepared'}: {error.strerror}"
            f"{where}; mend that, or name another --out",
            file=sys.stderr,
        )
        return 1
    _print_summary(options.out, manifest)
    return 0


def _verify(options: PrepOptions) -> Manifest:
    require(
        not (options.source or options.quickstart or options.overwrite),
        "--verify only checks --out; leave out --source, --quickstart and --overwrite",
    )
    manifest = Manifest.read(options.out)
    manifest.verify(options.out)
    print(f"{options.out}: every file is as it was written")
    return manifest


def _prepare(options: PrepOptions) -> Manifest:
    require(
        bool(options.source) != options.quickstart,
        "give either --quickstart or at least one --source name=path[:pattern,...], not both",
    )
    require(
        options.max_mb is None or 0 < options.max_mb < 1e9,
        f"--max-mb must be between 0 and 1e9, got {options.max_mb}; leave it out",
    )
    max_bytes = None if options.max_mb is None else max(1, int(options.max_mb * 1e6))
    if options.quickstart:
        sources = quickstart_sources() if max_bytes is None else quickstart_sources(cap_bytes=max_bytes)
    else:
        sources = [Source.parse(text, max_bytes=max_bytes) for text in options.source]
    return prepare(
        sources, options.out, validation_fraction=options.validation, overwrite=options.overwrite, report=print
    )


def _print_summary(out: Path, manifest: Manifest) -> None:
    domains = manifest.domains.values()
    train, validation = (sum(domain.split(s).tokens for domain in domains) for s in ("train", "validation"))
    print(f"{out}: {len(manifest.domains)} domains, {train:,} training and {validation:,} validation tokens")
    if not validation:
        print("no validation text: a domain needs at least two files and a --validation above 0 to hold one out")
    if manifest.entropies != Entropies():
        found = manifest.entropies
        print(
            f"entropy of the validation bytes in nats: {found.unigram:.3f} alone, {found.bigram:.3f} after one byte, "
            f"{found.trigram:.3f} after two"
        )
