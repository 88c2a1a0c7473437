import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetrain.data import prep
from moetrain.data.entropy import ContextCounts, Entropies
from moetrain.data.indexed import IndexedReader
from moetrain.data.manifest import Manifest
from moetrain.data.partial import clear_left_over, move_into_place, partial_folder
from moetrain.data.prep import prepare
from moetrain.data.sources import Source


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    for name, size in (("odd", 40), ("even", 21)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(size):
            (folder / f"{i:02}.txt").write_bytes(f"{name} {i} ".encode() * (i + 1) + b"\xff\x00")
    (tmp_path / "odd/empty.txt").write_bytes(b"")
    (tmp_path / "odd/one.txt").write_bytes(b"x")
    (tmp_path / "even/twin.txt").write_bytes((tmp_path / "odd/07.txt").read_bytes())
    return [Source(name="odd", path=tmp_path / "odd"), Source(name="even", path=tmp_path / "even")]


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


def test_killed_preparation_is_no_dataset(tmp_path: Path, sources: list[Source]) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from moetrain.data.manifest import Manifest; from moetrain.data.prep import prepare\n"
        "from moetrain.data.sources import Source\n"
        "Manifest.write = lambda self, folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare([Source(name='odd', path=Path(sys.argv[1]))], Path(sys.argv[2]))\n"
    )
    arguments = [sys.executable, "-c", program, str(sources[0].path), str(tmp_path / "out")]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = hidden(tmp_path)
    assert left.name.startswith(".out.partial-")
    with pytest.raises(ValueError, match="no prepared dataset at"):
        Manifest.read(left)
    lines: list[str] = []
    assert prepare(sources, tmp_path / "out", report=lines.append) == Manifest.read(tmp_path / "out")
    assert lines[0] == f"removed {left}, which a preparation that was killed had left"
    assert hidden(tmp_path) == []


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_another_preparation_is_writing_stays(tmp_path: Path, sources: list[Source]) -> None:
    """Two at once, of different datasets to one place: the second neither clears the first's folder nor is replaced."""
    place = tmp_path / "out"
    with partial_folder(place) as first:
        (first / "half.train.bin").write_text("of a dataset")
        assert clear_left_over(place) == []
        second = prepare(sources, place)
        assert (first / "half.train.bin").read_text() == "of a dataset"
        with pytest.raises(ValueError, match="appeared while it was being prepared"):
            move_into_place(first, place, replace=False)
        assert Manifest.read(place) == second
    assert hidden(tmp_path) == []


def test_a_replacement_that_was_killed_puts_the_dataset_back(tmp_path: Path, sources: list[Source]) -> None:
    """It is moved aside for a moment; what is killed then must not cost it."""
    before = prepare(sources, tmp_path / "out")
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from moetrain.data.prep import prepare; from moetrain.data.sources import Source\n"
        "rename = Path.rename\n"
        "def killed(path, target):\n"
        "    rename(path, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.rename = killed\n"
        "prepare([Source(name='odd', path=Path(sys.argv[1]))], Path(sys.argv[2]), overwrite=True)\n"
    )
    arguments = [sys.executable, "-c", program, str(sources[0].path), str(tmp_path / "out")]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert sorted(path.name.split("-")[0] for path in hidden(tmp_path)) == [".out.old", ".out.partial"]
    lines: list[str] = []
    assert prepare(sources, tmp_path / "out", report=lines.append) == before
    assert lines[-1] == f"{tmp_path / 'out'} is up to date"
    assert hidden(tmp_path) == []


KILLED = "0123456789abcdef" * 2  # as a preparation calls what it makes
USERS = [  # name behind ".out.", and a file in it
    ("old-20251130", "thesis.tex"),
    ("old-20251130", "odd.train.bin"),  # a copy of a dataset, by hand
    ("partial-my_notes", "monday.txt"),
    ("partial-abcdefgh", "odd.train.bin"),
    ("partial-abcdefgh", "odd.train.idx"),
    ("partial-abcdefgh", "manifest.json"),
    ("partial-abcdefgh", ".odd.train.bin.PID.partial"),  # being written
    ("partial-abcdefgh", ".odd.train.bin.0.partial"),
    (f"partial-{KILLED}", "thesis.tex"),
    (f"partial-{KILLED}", "plots/odd.train.bin"),
    (f"partial-{KILLED}", "odd.train.bin/thesis.tex"),
    (f"partial-{KILLED}", "manifest.json"),  # of another program
    (f"old-{KILLED}", "thesis.tex"),
    (f"old-{KILLED}", "odd.train.bin"),  # without a manifest that names it
]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(("name", "file"), USERS)
def test_folders_of_the_users_are_not_cleared(
    name: str, file: str, is_there: bool, tmp_path: Path, sources: list[Source]
) -> None:
    """Whatever they are called: what is in them decides."""
    if is_there:
        prepare(sources[:1], tmp_path / "out")
    mine = tmp_path / f".out.{name}" / file.replace("PID", str(os.getpid()))
    mine.parent.mkdir(parents=True)
    mine.write_text('{"years": 5}')
    lines: list[str] = []
    made = prepare(sources, tmp_path / "out", overwrite=is_there, report=lines.append)
    assert mine.read_text() == '{"years": 5}'
    assert Manifest.read(tmp_path / "out") == made
    assert not [line for line in lines if line.startswith("removed")]
    assert hidden(tmp_path) == [tmp_path / f".out.{name}"]


def test_a_killed_preparation_is_cleared_and_nothing_beside_it(tmp_path: Path, sources: list[Source]) -> None:
    left, noted = (tmp_path / f".out.partial-{digit * 32}" for digit in "ab")
    for folder in (left, noted):
        folder.mkdir()
        for name in ("odd.train.bin", ".odd.validation.idx.4711.partial", "manifest.json"):
            (folder / name).write_text('{"format": "moetrain-dataset", "domains')  # cut short
    (noted / "notes.txt").write_text("mine")
    assert clear_left_over(tmp_path / "out") == [left]
    assert hidden(tmp_path) == [noted]
    assert len(list(noted.iterdir())) == 4


@pytest.mark.parametrize("half", [".odd.validation.bin.{0}.partial", ".even.train.idx.{0}.partial", None])
@pytest.mark.parametrize("more", [None, "notes.txt", "manifest.json", "even.train.bin", "odd.validation.idx"])
def test_what_a_killed_preparation_of_an_earlier_version_left_is_cleared(
    half: str | None, more: str | None, tmp_path: Path, sources: list[Source]
) -> None:
    """Its folders have names that a user may give: all that is in one must be known to be of a preparation."""
    prepare(sources[:1], tmp_path / "first")
    left = tmp_path / ".out.partial-a_b9c8d7"
    left.mkdir()
    for name in ("odd.train.bin", "odd.train.idx"):
        (tmp_path / "first" / name).rename(left / name)
    if half is not None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        (left / half.format(ended.pid)).write_bytes(b"half")
    if more is not None:
        (left / more).write_text('{"format": "moetrain-dataset"}')
    is_left = more is None or (more == "even.train.bin" and half is not None and half.startswith(".even.train.idx"))
    assert clear_left_over(tmp_path / "out") == ([left] if is_left else [])
    assert left.exists() != is_left


def test_what_is_put_into_a_dataset_while_it_is_replaced_stays(
    tmp_path: Path, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(sources, tmp_path / "out")
    rename = Path.rename

    def noting(path: Path, target: Path) -> Path:
        moved = rename(path, target)
        if ".old-" in target.name:
            (target / "notes.txt").write_text("mine")
        return moved

    monkeypatch.setattr(Path, "rename", noting)
    prepare(sources[:1], tmp_path / "out", overwrite=True)
    (old,) = hidden(tmp_path)
    assert [path.name for path in old.iterdir()] == ["notes.txt"]


def test_similar_names_are_not_cleared(tmp_path: Path, sources: list[Source]) -> None:
    (tmp_path / "elsewhere").mkdir()
    partial = f"partial-{KILLED}"
    strangers = [".out.partial-mine", f".out2.{partial}", f".out.{partial}.txt", f".outX{partial}", f".out.{partial}0"]
    for name in strangers:
        (tmp_path / name).mkdir()
    (tmp_path / f".out.{partial}").write_text("a file")
    (tmp_path / f".out.old-{KILLED}").symlink_to(tmp_path / "elsewhere")
    prepare(sources, tmp_path / "out")
    assert len(hidden(tmp_path)) == len(strangers) + 2


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


def test_damaged_datasets_are_refused(tmp_path: Path, sources: list[Source]) -> None:
    out = tmp_path / "out"
    manifest = prepare(sources, out)
    manifest.verify(out)
    path = out / "odd.train.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:50] + bytes([raw[50] ^ 1]) + raw[51:])
    with pytest.raises(ValueError, match=r"odd\.train\.bin is damaged: SHA-256"):
        manifest.verify(out)
    path.write_bytes(raw[:-2])
    with pytest.raises(ValueError, match="it is truncated or changed"):
        Manifest.read(out)
    path.unlink()
    with pytest.raises(ValueError, match=r"odd\.train\.bin is missing, though manifest.json names it"):
        prepare(sources, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this moetrain reads 1"),
        ({"format": "other"}, "must have format 'moetrain-dataset', got 'other'"),
        (
            {"domains": 3},
            r"manifest.json is damaged: domains must be an object, got 3 \(int\); prepare the dataset again",
        ),
        ({"surplus": 3}, "manifest.json is damaged: it has no field called surplus; prepare"),
    ],
)
def test_damaged_manifests_are_refused(
    tmp_path: Path, sources: list[Source], change: dict[str, object], message: str
) -> None:
    prepare(sources, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    raw = path.read_text()
    path.write_text(json.dumps({**json.loads(raw), **change}))
    with pytest.raises(ValueError, match=message):
        Manifest.read(tmp_path / "out")
    path.write_text(raw[:-20])
    with pytest.raises(ValueError, match=r"manifest.json is damaged \(JSONDecodeError"):
        Manifest.read(tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("domains.odd.train.tokens", "x", "int from 0 to 2^63, got 'x' (str)"),
        ("domains.odd.train.tokens", -1, "int from 0 to 2^63, got -1 (int)"),
        ("domains.odd.train.tokens", True, "int from 0 to 2^63, got True (bool)"),
        ("domains.odd.validation.documents", 1.5, "int from 0 to 2^63, got 1.5 (float)"),
        ("domains.odd.validation.files", [], "an object, got [] (list)"),
        ("domains.odd.train.files.odd.train.bin.sha256", 7, "text, got 7 (int)"),
        ("domains.odd.train.files.odd.train.bin.bytes", None, "int from 0 to 2^63, got None (NoneType)"),
        ("domains.odd.entropies.bigram", float("nan"), "float from 0 to 2^63, got nan (float)"),
        ("domains.odd", "odd", "an object, got 'odd' (str)"),
        ("entropies.unigram", "2.5", "float from 0 to 2^63, got '2.5' (str)"),
        ("vocab_size", "259", "int from 0 to 2^63, got '259' (str)"),
        ("tokenizer", 1, "text, got 1 (int)"),
        ("options", [1], "an object, got [1] (list)"),
        ("fingerprint", {}, "text, got {} (dict)"),
    ],
)
def test_a_manifests_field_of_a_wrong_type_is_named(
    tmp_path: Path, sources: list[Source], field: str, value: object, must: str
) -> None:
    prepare(sources, tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    raw = json.loads(path.read_text())
    names = field.replace("odd.train.bin", "odd/train/bin").split(".")
    *tables, last = [name.replace("/", ".") for name in names]
    table = raw
    for name in tables:
        table = table[name]
    table[last] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - all of the text is compared
        Manifest.read(tmp_path / "out")
    assert str(caught.value) == f"{path} is damaged: {field} must be {must}; prepare the dataset again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is damaged: it must be an object, got "),
        ("{}", "must have format 'moetrain-dataset', got None"),
        ('{"format": "moetrain-dataset", "version": 1}', "is damaged: it lacks tokenizer, vocab_size, domains"),
        ("[" * 100_000, r"is damaged \(RecursionError"),
        ("1" * 5000, r"is damaged \(ValueError"),
    ],
)
def test_what_is_no_manifest_is_refused_by_its_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"manifest.json {message}"):
        Manifest.read(tmp_path)
