from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data.folders import hidden

from moetrain.data import prep
from moetrain.data.entropy import ContextCounts, Entropies
from moetrain.data.indexed import IndexedReader
from moetrain.data.manifest import Manifest
from moetrain.data.prep import prepare
from moetrain.data.sources import Source


def documents(out: Path, domain: str, split: str) -> list[bytes]:
    reader = IndexedReader(out / f"{domain}.{split}")
    found = [reader.sequence(i).tolist() for i in range(len(reader))]
    assert all(ids[-1] == 258 for ids in found)
    return [bytes(ids[:-1]) for ids in found]


def test_every_text_once_and_splits_disjoint(tmp_path: Path, sources: list[Source]) -> None:
    out = tmp_path / "out"
    manifest = prepare(sources, out, validation_fraction=0.2)
    texts = {(d, s): documents(out, d, s) for d in ("odd", "even") for s in ("train", "validation")}
    everything = [text for group in texts.values() for text in group]
    on_disk = {path.read_bytes() for s in sources for path in s.path.iterdir()} - {b""}
    assert len(everything) == len(set(everything)) == len(on_disk) == 62
    assert set(everything) == on_disk
    for (domain, split), group in texts.items():
        info = manifest.domains[domain].split(split)
        assert info.documents == len(group) >= 1
        assert info.bytes == sum(map(len, group))
        assert info.tokens == info.bytes + info.documents
    odd, even = manifest.domains["odd"], manifest.domains["even"]
    assert (odd.empty, odd.duplicates, even.empty, even.duplicates) == (1, 0, 0, 1)
    assert manifest == Manifest.read(out)


def test_entropies_are_those_of_the_validation_bytes(tmp_path: Path, sources: list[Source]) -> None:
    manifest = prepare(sources, tmp_path / "out", validation_fraction=0.2)
    overall = ContextCounts()
    for domain in ("odd", "even"):
        counts = ContextCounts()
        for text in documents(tmp_path / "out", domain, "validation"):
            counts.add(text)
        assert manifest.domains[domain].entropies == counts.entropies()
        overall.merge(counts)
    assert manifest.entropies == overall.entropies()
    assert manifest.entropies.unigram > manifest.entropies.bigram > manifest.entropies.trigram > 0
    assert prepare(sources, tmp_path / "none", validation_fraction=0.0).entropies == Entropies()


def test_same_request_returns_at_once(tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(sources, tmp_path / "out")
    stamp = (tmp_path / "out/odd.train.bin").stat().st_mtime_ns
    monkeypatch.setattr(prep, "_write", None)  # would raise if it were called
    lines: list[str] = []
    assert prepare(sources, tmp_path / "out", report=lines.append) == first
    assert lines == [f"{tmp_path / 'out'} is up to date"]
    assert (tmp_path / "out/odd.train.bin").stat().st_mtime_ns == stamp


def touched(sources: list[Source]) -> tuple[list[Source], dict[str, float]]:
    (sources[0].path / "03.txt").write_text("changed")
    return sources, {}


def added(sources: list[Source]) -> tuple[list[Source], dict[str, float]]:
    (sources[0].path / "new.txt").write_text("new")
    return sources, {}


@pytest.mark.parametrize(
    "change",
    [
        touched,
        added,
        lambda sources: (sources[:1], {}),
        lambda sources: (sources[::-1], {}),
        lambda sources: ([replace(sources[0], patterns=("1*",)), sources[1]], {}),
        lambda sources: (sources, {"validation_fraction": 0.06}),
    ],
)
def test_another_request_is_refused_or_overwrites(
    tmp_path: Path,
    sources: list[Source],
    change: Callable[[list[Source]], tuple[list[Source], dict[str, Any]]],
) -> None:
    before = prepare(sources, tmp_path / "out")
    others, options = change(sources)
    with pytest.raises(ValueError, match=r"holds a dataset of other sources or options.*overwrite"):
        prepare(others, tmp_path / "out", **options)
    assert Manifest.read(tmp_path / "out") == before
    after = prepare(others, tmp_path / "out", overwrite=True, **options)
    assert after.fingerprint != before.fingerprint
    assert Manifest.read(tmp_path / "out") == after
    assert hidden(tmp_path) == []


def test_two_preparations_are_byte_equal(tmp_path: Path, sources: list[Source]) -> None:
    prepare(sources, tmp_path / "a")
    prepare(sources, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_interruption_leaves_nothing(tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Manifest, folder: Path) -> None:
        assert (folder / "even.validation.idx").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(sources, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["even", "odd"]
    assert prepare(sources, tmp_path / "out") == Manifest.read(tmp_path / "out")


def test_a_dataset_is_no_text_of_its_own_source(tmp_path: Path, sources: list[Source]) -> None:
    """As with ``--source all=. --out ./data``: a second call finds what the first one wrote."""
    source = [Source(name="odd", path=sources[0].path)]
    out = sources[0].path / "made" / "corpus"
    first = prepare(source, out)
    assert prepare(source, out) == first
    assert prepare(source, out, overwrite=True) == first


def test_a_linked_folder_is_written_where_it_leads(tmp_path: Path, sources: list[Source]) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    prepare(sources, tmp_path / "out")
    after = prepare(sources[:1], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert Manifest.read(tmp_path / "disk") == after
    assert hidden(tmp_path) == []


def test_foreign_folders_are_never_replaced(tmp_path: Path, sources: list[Source]) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="precious exists and is no prepared dataset"):
        prepare(sources, out)
    with pytest.raises(ValueError, match=r"will not be overwritten: thesis.tex in it is no part of a dataset"):
        prepare(sources, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years"
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"file is no folder.*; choose another --out"):
            prepare(sources, tmp_path / "file", overwrite=overwrite)


@pytest.mark.parametrize(
    ("manifest", "others", "stranger"),
    [
        (None, ["corpus.train.bin", "corpus.train.idx"], "corpus.train.bin"),  # Megatron's, made by other means
        ('{"name": "an extension", "version": "1.0"}', [], "manifest.json"),
        ("[]", [], "manifest.json"),
        ("{", ["odd.train.bin", "notes.train.bin.txt"], "notes.train.bin.txt"),
        ("ours", ["mine.train.bin"], "mine.train.bin"),
        ("ours", ["my-manifest.json"], "my-manifest.json"),
    ],
)
def test_files_that_only_look_like_a_datasets_are_not_replaced(
    tmp_path: Path, sources: list[Source], manifest: str | None, others: list[str], stranger: str
) -> None:
    out = tmp_path / "out"
    if manifest == "ours":
        prepare(sources, out)
    else:
        out.mkdir()
        if manifest is not None:
            (out / "manifest.json").write_text(manifest)
    for name in others:
        (out / name).write_text("years")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=rf"will not be overwritten: {stranger} in it is no part of a dataset"):
        prepare(sources, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_dataset_with_a_damaged_manifest_is_replaced(tmp_path: Path, sources: list[Source]) -> None:
    prepare(sources, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{")
    assert prepare(sources, tmp_path / "out", overwrite=True) == Manifest.read(tmp_path / "out")


def test_empty_folder_is_used(tmp_path: Path, sources: list[Source]) -> None:
    (tmp_path / "out").mkdir()
    assert prepare(sources, tmp_path / "out") == Manifest.read(tmp_path / "out")


def test_bad_requests(tmp_path: Path, sources: list[Source]) -> None:
    with pytest.raises(ValueError, match="there must be at least one source"):
        prepare([], tmp_path / "out")
    with pytest.raises(ValueError, match="source names must be distinct"):
        prepare([sources[0]] * 2, tmp_path / "out")
    with pytest.raises(ValueError, match=r"source odd: no text in .* matches \*\.rst \(0 files"):
        prepare([replace(sources[0], patterns=("*.rst",))], tmp_path / "out")
    with pytest.raises(ValueError, match="validation_fraction must be between"):
        prepare(sources, tmp_path / "out", validation_fraction=-0.1)
    assert not (tmp_path / "out").exists()
