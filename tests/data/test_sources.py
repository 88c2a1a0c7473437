import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.corpus import quickstart_sources
from moetrain.data.sources import Source, select_files, split_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = {"a.txt": b"alpha", "sub/b.txt": b"beta", "sub/c.md": b"gamma", "sub/deep/d.txt": b"delta"}
    hidden = {".git/x.txt": b"no", "sub/.e.txt": b"no", "test/f.txt": b"zeta"}
    for name, contents in {**texts, **hidden}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(contents)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (("*",), {"a.txt", "sub/b.txt", "sub/c.md", "sub/deep/d.txt", "test/f.txt"}),
        (("*.txt",), {"a.txt", "sub/b.txt", "sub/deep/d.txt", "test/f.txt"}),
        (("**/*.md",), {"sub/c.md"}),
        (("sub/*.txt", "*.md"), {"sub/b.txt", "sub/c.md", "sub/deep/d.txt"}),
    ],
)
def test_patterns_and_hidden_files(folder: Path, patterns: tuple[str, ...], found: set[str]) -> None:
    assert {name for name, _ in Source(name="s", path=folder, patterns=patterns).files()} == found


def test_excluded_folders_and_single_files(folder: Path) -> None:
    names = [name for name, _ in Source(name="s", path=folder, exclude=("test", "deep")).files()]
    assert sorted(names) == ["a.txt", "sub/b.txt", "sub/c.md"]
    assert Source(name="s", path=folder / "a.txt").files() == [("a.txt", folder / "a.txt")]


def test_order_depends_on_names_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = [name for name, _ in Source(name="s", path=folder).files()]
    other = tmp_path_factory.mktemp("other")
    for name in sorted(before, reverse=True):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(b"anything")
    assert [name for name, _ in Source(name="t", path=other).files()] == before
    assert before != sorted(before)


def test_parse(folder: Path, tmp_path: Path) -> None:
    assert Source.parse(f"x={folder}") == Source(name="x", path=folder)
    assert Source.parse(f"x={folder}:*.md,*.txt", max_bytes=7) == Source(
        name="x", path=folder, patterns=("*.md", "*.txt"), max_bytes=7
    )
    (tmp_path / "odd:name").mkdir()
    assert Source.parse(f"x={tmp_path}/odd:name").path == tmp_path / "odd:name"
    for text in ("x", "x=", "=y"):
        with pytest.raises(ValueError, match=r"must be name=path|must be letters"):
            Source.parse(text)
    with pytest.raises(ValueError, match="a pattern is empty"):
        Source.parse(f"x={folder}:*.md,")


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b"])
def test_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(ValueError, match="must be letters, digits"):
        Source(name=name, path=Path("."))


def test_missing_folder_and_cap() -> None:
    with pytest.raises(ValueError, match="source s: /nowhere is neither a folder nor a file"):
        Source(name="s", path=Path("/nowhere")).files()
    with pytest.raises(ValueError, match="max_bytes must be positive, got 0"):
        Source(name="s", path=Path("."), max_bytes=0)


def test_compressed_and_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text \xff"))
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"text")[:-9])
    (tmp_path / "c.gz").write_bytes(b"plain")
    strict = Source(name="s", path=tmp_path)
    assert strict.read(tmp_path / "a.gz") == b"text \xff"
    for name in ("b.gz", "c.gz", "missing"):
        with pytest.raises(ValueError, match=f"source s: cannot read .*{name}.*repair or exclude the file"):
            strict.read(tmp_path / name)
    selection = select_files(Source(name="s", path=tmp_path, skip_unreadable=True), strict.files(), set())
    assert ([name for name, _ in selection.kept], selection.unreadable) == (["a.gz"], 2)


def test_empty_and_repeated_files_are_counted(tmp_path: Path) -> None:
    for name, contents in {"a": b"one", "b": b"", "c": b"one", "d": b"two", "e": b"known"}.items():
        (tmp_path / name).write_bytes(contents)
    source = Source(name="s", path=tmp_path)
    seen: set[bytes] = set()
    (tmp_path / "z").mkdir()
    (tmp_path / "z/e").write_bytes(b"known")
    first = select_files(source, [("z/e", tmp_path / "z/e")], seen)
    assert len(first.kept) == 1
    selection = select_files(source, [(n, tmp_path / n) for n in "abcde"], seen)
    assert [name for name, _ in selection.kept] == ["a", "d"]
    assert (selection.empty, selection.duplicates, selection.unreadable) == (1, 2, 0)


def test_cap_stops_after_enough_text(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 100)
    source = Source(name="s", path=tmp_path, max_bytes=250)
    kept = [name for name, _ in select_files(source, source.files(), set()).kept]
    assert kept == [name for name, _ in source.files()][:3]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(max_size=8), max_size=40), st.floats(0, 1))
def test_split_is_stable_and_never_takes_all(names: set[str], fraction: float) -> None:
    ordered = sorted(names)
    held = split_files(ordered, fraction)
    assert held <= names
    assert held == split_files(ordered[::-1], fraction)
    if fraction > 0 and len(names) >= 2:
        assert 1 <= len(held) < len(names)
    else:
        assert not held


def test_split_takes_about_its_share_and_does_not_move_files() -> None:
    names = [f"file{i}" for i in range(4000)]
    held = split_files(names, 0.05)
    assert 150 < len(held) < 250
    assert split_files(names[:2000], 0.05) == held & set(names[:2000])
    with pytest.raises(ValueError, match=r"validation_fraction must be between 0.0 and 1.0, got 1.5"):
        split_files(names, 1.5)


def test_quickstart_works_with_python_alone(tmp_path: Path) -> None:
    (only,) = quickstart_sources(tmp_path, cap_bytes=1000)
    assert only.name == "python"
    names = [name for name, _ in only.files()]
    assert len(names) > 100
    assert all(name.endswith(".py") and not name.startswith(("test/", "site-packages/")) for name in names)
    (tmp_path / "include").mkdir()
    assert len(quickstart_sources(tmp_path)) == 1  # an empty folder is no domain
    (tmp_path / "include/x.h").write_text("int x;")
    (tmp_path / "share/man/man1").mkdir(parents=True)
    (tmp_path / "share/man/man1/ls.1").write_text("list")
    (tmp_path / "share/man/de/man1").mkdir(parents=True)
    (tmp_path / "share/man/de/man1/ls.1").write_text("liste")
    found = {source.name: source.files() for source in quickstart_sources(tmp_path)}
    assert set(found) == {"python", "man", "headers"}
    assert [name for name, _ in found["man"]] == ["man1/ls.1"]
