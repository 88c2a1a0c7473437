"""A dataset whose manifest or files are damaged is refused by name."""

import json
from pathlib import Path

import pytest

from moetrain.data.manifest import Manifest
from moetrain.data.prep import prepare
from moetrain.data.sources import Source


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
