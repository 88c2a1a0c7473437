import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.dataset import PackedDataset, PackedRow
from moetrain.data.entropy import ContextCounts
from moetrain.data.indexed import IndexedReader, IndexedWriter
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.data.stream import TokenStream, shuffled

EOD, PAD = 258, 256


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains; sizes from one byte to many rows."""
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(5)
    for domain, size in (("big", 60), ("mid", 25), ("tiny", 4)):
        (root / domain).mkdir()
        for i in range(size):
            length = 1 if i % 5 == 0 else rng.randint(1, 400 if i % 7 else 3000)
            (root / domain / f"{i}").write_bytes(rng.randbytes(length))
    out = root / "out"
    prepare([Source(name=n, path=root / n) for n in ("big", "mid", "tiny")], out, validation_fraction=0.3)
    return out


def same(a: PackedRow, b: PackedRow) -> bool:
    return (a.domain, a.borders) == (b.domain, b.borders) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("token_id_T", "target_T")
    )


def by_definition(tokens: list[int]) -> tuple[list[int], ...]:
    """Inputs, targets and where documents begin, one token at a time."""
    ids, targets, borders = [], [], [0]
    for now, following in pairwise(tokens):
        ids.append(now)
        targets.append(-1 if now == EOD else following)
        if now == EOD:
            borders.append(len(ids))
    return ids, targets, borders if borders[-1] == len(ids) else [*borders, len(ids)]


def as_lists(row: PackedRow) -> tuple[list[int], ...]:
    return row.token_id_T.tolist(), row.target_T.tolist(), list(row.borders)


@pytest.mark.parametrize("seq_len", [1, 2, 64, 1000])
def test_training_rows_tile_shuffled_epochs(corpus: Path, seq_len: int) -> None:
    data = PackedDataset(corpus, "train", seq_len, seed=3)
    reader = IndexedReader(corpus / "mid.train")
    stored = [reader.sequence(i).tolist() for i in range(len(reader))]
    stream = [
        x for epoch in range(3) for i in shuffled(len(stored), "documents", 3, "mid", epoch).tolist() for x in stored[i]
    ]
    rows_per_epoch = max(1, len(stream) // 3 // seq_len)
    order = [
        epoch * rows_per_epoch + place
        for epoch in range(3)
        for place in shuffled(rows_per_epoch, "rows", 3, "mid", epoch).tolist()
    ]
    rows = [row_id for row_id in range(400) if data.locate(row_id)[0] == "mid"]
    for row_id, piece in zip(rows, order, strict=False):
        start = piece * seq_len
        assert data.locate(row_id) == ("mid", start)
        if start + seq_len + 1 > len(stream):
            continue
        row = data.row(row_id)
        assert as_lists(row) == by_definition(stream[start : start + seq_len + 1])
        assert data.num_loss_tokens(row_id) == int((row.target_T >= 0).sum())
        assert data.num_tokens(row_id) == len(row.token_id_T) == row.borders[-1] == seq_len


def test_each_epoch_has_every_document_in_another_order(corpus: Path) -> None:
    reader = IndexedReader(corpus / "big.train")
    stream = TokenStream(reader, "big", 3, 259)
    size = stream.num_tokens
    epochs = [stream.read(epoch * size, size).tolist() for epoch in range(3)]
    texts = [sorted(bytes(x for x in part) for part in split_at_eod(epoch)) for epoch in epochs]
    assert texts[0] == texts[1] == texts[2]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert stream.read(0, size).tolist() == epochs[0]  # after its epoch had left the cache


def split_at_eod(tokens: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == EOD:
            parts.append([])
        else:
            parts[-1].append(token)
    assert parts.pop() == []
    return parts


def test_rows_do_not_depend_on_the_order_of_asking(corpus: Path) -> None:
    forward, backward = (PackedDataset(corpus, "train", 32, seed=7) for _ in range(2))
    first = [forward.row(i) for i in range(150)]
    last = [backward.row(i) for i in reversed(range(150))][::-1]
    assert all(same(a, b) for a, b in zip(first, last, strict=True))
    other = PackedDataset(corpus, "train", 32, seed=8)
    assert not all(same(row, other.row(i)) for i, row in enumerate(first))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9))
def test_far_rows_are_consistent(corpus: Path, row_id: int) -> None:
    data = PackedDataset(corpus, "train", 48, seed=1)
    row = data.row(row_id)
    assert as_lists(row) == by_definition([*row.token_id_T.tolist(), row.target_T[-1]])
    assert data.num_loss_tokens(row_id) == int((row.target_T >= 0).sum())


def test_each_epoch_takes_every_piece_once_in_another_order(corpus: Path) -> None:
    data = PackedDataset(corpus, "train", 16, seed=5)
    starts: dict[str, list[int]] = {}
    for row_id in range(6000):
        domain, start = data.locate(row_id)
        starts.setdefault(domain, []).append(start // 16)
    for domain, pieces in starts.items():
        count = IndexedReader(corpus / f"{domain}.train").num_tokens // 16
        epochs = [pieces[at : at + count] for at in range(0, len(pieces) - count + 1, count)][:3]
        assert epochs, f"{domain}: fewer rows than an epoch has"
        for idx, epoch in enumerate(epochs):
            assert sorted(epoch) == list(range(idx * count, (idx + 1) * count))
            if count > 5:
                neighbours = sum(b == a + 1 for a, b in pairwise(epoch))
                assert neighbours < count / 2
        if count > 5 and len(epochs) > 1:
            assert [piece - count for piece in epochs[1]] != epochs[0]


def test_neighbouring_pieces_overlap_by_one_token(corpus: Path) -> None:
    data = PackedDataset(corpus, "train", 16)
    rows = {data.locate(row_id): data.row(row_id) for row_id in range(600)}
    met = 0
    for (domain, start), row in rows.items():
        after = rows.get((domain, start + 16))
        if after is not None and row.target_T[-1] >= 0:
            assert row.target_T[-1] == after.token_id_T[0]
            met += 1
    assert met > 50


def test_mixing_follows_weights_or_tokens(corpus: Path) -> None:
    weights = {"big": 1.0, "tiny": 3.0, "mid": 0.0}
    data = PackedDataset(corpus, "train", 16, domain_weights=weights)
    found = [data.locate(i)[0] for i in range(400)]
    assert (found.count("big"), found.count("tiny")) == (100, 300)
    plain = PackedDataset(corpus, "train", 16)
    tokens = {name: info.train.tokens for name, info in plain.manifest.domains.items()}
    found = [plain.locate(i)[0] for i in range(2000)]
    for name, count in tokens.items():
        assert abs(found.count(name) - 2000 * count / sum(tokens.values())) <= 3


def test_mixing_does_not_depend_on_the_order_of_the_weights(corpus: Path) -> None:
    one, two = (
        PackedDataset(corpus, "train", 16, domain_weights=dict(w))
        for w in ([("big", 1.0), ("mid", 2.0)], [("mid", 2.0), ("big", 1.0)])
    )
    assert [one.locate(i) for i in range(50)] == [two.locate(i) for i in range(50)]


@pytest.mark.parametrize("seq_len", [1, 7, 100, 5000])
def test_validation_has_every_token_once(corpus: Path, seq_len: int) -> None:
    data = PackedDataset(corpus, "validation", seq_len, seed=3)
    assert data.num_rows is not None
    spans: dict[str, list[tuple[int, PackedRow]]] = {}
    for row_id in range(data.num_rows):
        domain, start = data.locate(row_id)
        row = data.row(row_id)
        assert data.num_tokens(row_id) == len(row.token_id_T) == row.borders[-1] >= 1
        assert data.num_loss_tokens(row_id) == int((row.target_T >= 0).sum())
        spans.setdefault(domain, []).append((start, row))
    for name, rows in spans.items():
        reader = IndexedReader(corpus / f"{name}.validation")
        stream = reader.tokens.tolist()
        ordered = sorted(rows, key=lambda pair: pair[0])
        assert [start for start, _ in ordered] == list(range(0, len(stream) - 1, seq_len))
        for start, row in ordered:
            assert as_lists(row) == by_definition(stream[start : start + seq_len + 1])
    texts = sum(info.validation.tokens > 1 for info in data.manifest.domains.values())
    assert len(spans) == texts
    with pytest.raises(IndexError, match=rf"validation row must be in \[0, {data.num_rows}\), got {data.num_rows}"):
        data.row(data.num_rows)


def test_validation_order_is_fixed_and_mixed(corpus: Path) -> None:
    one, two = (PackedDataset(corpus, "validation", 16, seed=seed) for seed in (1, 2))
    assert one.num_rows is not None
    assert all(same(one.row(i), two.row(i)) for i in range(one.num_rows))
    starts = [start for domain, start in map(one.locate, range(40)) if domain == "big"]
    assert starts != sorted(starts)
    assert len({one.locate(i)[0] for i in range(one.num_rows)}) == 3


def test_training_and_validation_share_no_document(corpus: Path) -> None:
    texts = {}
    for split in ("train", "validation"):
        readers = [IndexedReader(corpus / f"{name}.{split}") for name in ("big", "mid", "tiny")]
        texts[split] = {r.sequence(i).tobytes() for r in readers for i in range(len(r))}
    assert texts["validation"]
    assert not texts["train"] & texts["validation"]


def test_no_validation_files(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/only").write_bytes(b"alone")
    prepare([Source(name="one", path=tmp_path / "text")], tmp_path / "out")
    data = PackedDataset(tmp_path / "out", "validation", 8)
    assert data.num_rows == 0
    with pytest.raises(IndexError, match=r"validation row must be in \[0, 0\), got 0"):
        data.row(0)
    row = PackedDataset(tmp_path / "out", "train", 8).row(0)  # longer than the corpus: it repeats
    assert row.token_id_T.tolist() == [*b"alone", EOD, *b"al"]
    assert row.target_T.tolist() == [*b"lone", EOD, -1, *b"lo"]
    assert row.borders == (0, 6, 8)


def test_bad_arguments(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names 'bigg', but .* has big, mid, tiny; did you mean 'big'"):
        PackedDataset(corpus, "train", 8, domain_weights={"bigg": 1.0})
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', got 'test'"):
        PackedDataset(corpus, "test", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        PackedDataset(corpus, "train", 0)
    with pytest.raises(ValueError, match=r"no prepared dataset at .*run `moetrain prep --quickstart"):
        PackedDataset(tmp_path / "nothing", "train", 8)
    with pytest.raises(IndexError, match=r"train row must be in \[0, infinity\), got -1"):
        PackedDataset(corpus, "train", 8).row(-1)


def test_ids_outside_the_vocabulary_name_document_and_offset(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.array([1, 2, EOD]))
        writer.add_document(np.array([], np.int64))
        writer.add_document(np.array([3, 4, 259, EOD]))
    stream = TokenStream(IndexedReader(tmp_path / "x"), "d", None, 259)
    assert stream.read(0, 5).tolist() == [1, 2, EOD, 3, 4]
    assert (stream.num_ends(0, 7), stream.num_ends(0, 6), stream.num_ends(2, 1), stream.num_ends(5, 9)) == (2, 1, 1, 3)
    with pytest.raises(
        ValueError, match=r"domain d: token 259 at offset 2 of document 2 in .*x\.bin must be in \[0, 259\)"
    ):
        stream.read(0, 6)


def test_streams_without_tokens_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16):
        pass
    with pytest.raises(ValueError, match=r"domain d: .* holds no tokens"):
        TokenStream(IndexedReader(tmp_path / "x"), "d", None, 259)


def test_shuffles_are_pinned() -> None:
    assert sorted(shuffled(1000, "a", 1).tolist()) == list(range(1000))
    assert shuffled(8, "documents", 1234, "python", 0).tolist() == [4, 6, 0, 2, 3, 7, 1, 5]
    assert shuffled(0, "a").tolist() == []
    assert shuffled(50, "a", 1).tolist() != shuffled(50, "a", 2).tolist()


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({}, ["big", "mid", "tiny"]),
        ({"big": 1, "mid": 2, "tiny": 0.5}, ["big", "mid", "tiny"]),
        ({"big": 1}, ["big"]),
        ({"mid": 1, "big": 0}, ["mid"]),
        ({"mid": 1, "tiny": 3}, ["mid", "tiny"]),
    ],
)
def test_entropies_are_those_of_the_domains_that_validate(
    corpus: Path, weights: dict[str, float], names: list[str]
) -> None:
    dataset = PackedDataset(corpus, "validation", 64, domain_weights=weights)
    counts = ContextCounts()
    for name in names:
        reader = IndexedReader(corpus / f"{name}.validation")
        for idx in range(len(reader)):
            counts.add(bytes(reader.sequence(idx)[:-1].tolist()))
    found = dataset.entropies()
    assert found == counts.entropies()
    validated = [dataset.row(row_id) for row_id in range(dataset.num_rows or 0)]
    assert found.bytes == sum(int((row.token_id_T < 256).sum()) for row in validated)


def test_no_entropies_are_known_of_training_text(corpus: Path) -> None:
    with pytest.raises(ValueError, match="split must be one of 'validation', got 'train'"):
        PackedDataset(corpus, "train", 64).entropies()
