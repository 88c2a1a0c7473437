"""Turning folders of text into a dataset: one indexed token stream per domain and split, and a manifest."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.config.errors import require, require_in
from moetrain.data.entropy import ContextCounts
from moetrain.data.indexed import IndexedWriter
from moetrain.data.manifest import MANIFEST, SPLITS, DomainInfo, FileInfo, Manifest, SplitInfo
from moetrain.data.own_files import strangers
from moetrain.data.partial import clear_left_over, move_into_place, partial_folder, sync
from moetrain.data.sources import Selection, Source, select_files, split_files
from moetrain.data.tokenizer import ByteTokenizer

Files = list[tuple[str, Path]]


def prepare(
    sources: Sequence[Source],
    out_dir: Path,
    *,
    validation_fraction: float = 0.05,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write a dataset at ``out_dir``, or return at once where it is there already.

    Each file is one document: its bytes, then EOD. Files with equal contents are kept once in the whole dataset, and
    each file goes wholly to training or to validation by a hash of its path, so no validation text is trained on.

    Args:
        sources: one per domain.
        out_dir: becomes a folder of ``<domain>.<split>.{bin,idx}`` and ``manifest.json``.
        validation_fraction: expected share of files that validate.
        overwrite: replace a dataset of other sources or options.
        report: is told, line by line, what happens.

    Raises:
        ValueError: where sources are missing or empty, or ``out_dir`` holds something else.
    """
    require(bool(sources), "prepare: there must be at least one source; give --source name=path or --quickstart")
    require_in("validation_fraction", validation_fraction, 0.0, 1.0)
    names = [source.name for source in sources]
    require(len(set(names)) == len(names), f"prepare: source names must be distinct, got {names}; rename one")
    out_dir = Path(out_dir)
    place = Path(os.path.realpath(out_dir))
    files = {source.name: _without(place, source) for source in sources}
    options = {"validation_fraction": validation_fraction, "sources": [_describe(source) for source in sources]}
    fingerprint = _fingerprint(options, files)
    for path in clear_left_over(place):
        report(f"removed {path}, which a preparation that was killed had left")
    if not overwrite and (found := _existing(out_dir, fingerprint)):
        report(f"{out_dir} is up to date")
        return found
    if overwrite:
        _require_replaceable(out_dir)
    place.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(place) as partial:
        manifest = _write(sources, files, partial, options, fingerprint, report)
        if overwrite:
            _require_replaceable(out_dir)  # again: this took a while
        move_into_place(partial, place, replace=overwrite)
    return manifest


def _without(place: Path, source: Source) -> Files:
    """The files of ``source`` but for those of the dataset itself, where that lies in the same folder."""
    files = source.files()
    if not place.is_relative_to(os.path.realpath(source.path)):
        return files
    return [(name, path) for name, path in files if not Path(os.path.realpath(path)).is_relative_to(place)]


def _write(
    sources: Sequence[Source],
    files: dict[str, Files],
    folder: Path,
    options: dict[str, Any],
    fingerprint: str,
    report: Callable[[str], None],
) -> Manifest:
    tokenizer, seen, overall = ByteTokenizer(), set[bytes](), ContextCounts()
    domains: dict[str, DomainInfo] = {}
    for source in sources:
        selection = select_files(source, files[source.name], seen)
        require(
            bool(selection.kept),
            f"source {source.name}: no text in {source.path} matches {','.join(source.patterns)} "
            f"({len(files[source.name])} files, {selection.empty} empty, {selection.duplicates} repeated); "
            "correct the path or the pattern",
        )
        counts = ContextCounts()
        domains[source.name] = _write_domain(
            source, selection, options["validation_fraction"], folder, tokenizer, counts
        )
        overall.merge(counts)
        report(_summary(source.name, domains[source.name]))
    manifest = Manifest(tokenizer.name, tokenizer.vocab_size, domains, overall.entropies(), options, fingerprint)
    manifest.write(folder)
    sync(folder / MANIFEST)
    return manifest


def _write_domain(
    source: Source,
    selection: Selection,
    validation_fraction: float,
    folder: Path,
    tokenizer: ByteTokenizer,
    counts: ContextCounts,
) -> DomainInfo:
    held_out = split_files([relative for relative, _ in selection.kept], validation_fraction)
    splits = {}
    for split in SPLITS:
        paths = [path for relative, path in selection.kept if (relative in held_out) == (split == "validation")]
        watch = counts.add if split == "validation" else None
        splits[split] = _write_split(source, paths, folder / f"{source.name}.{split}", tokenizer, watch)
    return DomainInfo(
        splits["train"],
        splits["validation"],
        counts.entropies(),
        selection.empty,
        selection.duplicates,
        selection.unreadable,
    )


def _write_split(
    source: Source,
    paths: Iterable[Path],
    prefix: Path,
    tokenizer: ByteTokenizer,
    watch: Callable[[bytes], None] | None,
) -> SplitInfo:
    eod = np.array([tokenizer.eod_id], tokenizer.dtype)
    documents = tokens = num_bytes = 0
    with IndexedWriter(prefix, tokenizer.dtype) as writer:
        for path in paths:
            contents = source.read(path)
            require(bool(contents), f"source {source.name}: {path} changed while it was being read; prepare again")
            assert contents is not None
            document = np.concatenate([tokenizer.encode(contents), eod])
            writer.add_document(document)
            if watch:
                watch(contents)
            documents, tokens, num_bytes = documents + 1, tokens + len(document), num_bytes + len(contents)
    made = [prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx")]
    return SplitInfo(documents, tokens, num_bytes, {path.name: FileInfo.of(path) for path in made})


def _existing(out_dir: Path, fingerprint: str) -> Manifest | None:
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    require(out_dir.is_dir(), f"{out_dir} is no folder; choose another --out")
    require(
        (out_dir / MANIFEST).is_file(),
        f"{out_dir} exists and is no prepared dataset ({MANIFEST} is missing); choose another --out, or --overwrite it",
    )
    manifest = Manifest.read(out_dir)
    require(
        manifest.fingerprint == fingerprint,
        f"{out_dir} holds a dataset of other sources or options (files may have changed since); "
        "choose another --out, or --overwrite it",
    )
    return manifest


def _require_replaceable(out_dir: Path) -> None:
    """Refuse to delete a folder that is not a dataset: a mistyped --out must not cost somebody's files."""
    if not out_dir.exists():
        return
    require(out_dir.is_dir(), f"{out_dir} is no folder and will not be overwritten; choose another --out")
    strange = strangers(out_dir)
    require(
        not strange,
        f"{out_dir} will not be overwritten: {strange[0] if strange else ''} in it is no part of a dataset; "
        "choose another --out or remove the folder yourself",
    )


def _fingerprint(options: dict[str, Any], files: dict[str, Files]) -> str:
    """Names, sizes and times of all candidate files, and the options; contents are not read."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, pairs in files.items():
        for relative, path in pairs:
            stat = path.stat()
            digest.update(f"{name}\0{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _describe(source: Source) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(source), default=str))


def _summary(name: str, domain: DomainInfo) -> str:
    left_out = f"{domain.empty} empty, {domain.duplicates} repeated, {domain.unreadable} unreadable left out"
    train, validation = domain.train, domain.validation
    return (
        f"{name:<12} train {train.documents:>6} documents {train.bytes / 1e6:8.2f} MB   "
        f"validation {validation.documents:>5} documents {validation.bytes / 1e6:7.2f} MB   ({left_out})"
    )
