"""Documents as sequences of their own."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.dataset import PackedDataset
from moetrain.data.documents import DocumentDataset
from moetrain.data.indexed import IndexedReader
from moetrain.data.loader import DocumentLoader
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.data.tokenizer import ByteTokenizer
from moetrain.sequence import Item, SequencePlan, plan_data

EOD = ByteTokenizer().eod_id


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains; one document has but an EOD."""
    rng, root = random.Random(3), tmp_path_factory.mktemp("documents")
    for domain, size in (("big", 60), ("small", 9)):
        (root / domain).mkdir()
        for i in range(size):
            (root / domain / str(i)).write_bytes(rng.randbytes(0 if i == 4 else rng.randint(1, 40 if i % 5 else 300)))
    prepare([Source(name=name, path=root / name) for name in ("big", "small")], root / "out", validation_fraction=0.3)
    return root / "out"


def texts_of(corpus: Path, name: str, split: str) -> list[bytes]:
    """Stored documents with a target, EOD included."""
    reader = IndexedReader(corpus / f"{name}.{split}")
    found = [reader.sequence(i) for i in range(len(reader))]
    return sorted(text.astype(np.int32).tobytes() for text in found if len(text) > 1)


def read_whole(data: DocumentDataset, sequence_id: int, num_tokens: int) -> tuple[list[int], list[int]]:
    inputs, targets = data.read(sequence_id, 0, num_tokens)
    return inputs.tolist(), targets.tolist()


@pytest.mark.parametrize("context", [1, 7, 64, 1000])
def test_an_epoch_has_every_token_of_every_document_once(corpus: Path, context: int) -> None:
    data = DocumentDataset(corpus, "train", context, seed=2, domain_weights={"small": 1.0})
    size = IndexedReader(corpus / "small.train").num_tokens
    for epoch in range(3):
        table_N3 = data.table(epoch * size, size)
        parts: dict[int, list[tuple[int, list[int], list[int]]]] = {}
        for id, num_tokens, num_loss_tokens in table_N3.tolist():
            assert 1 <= num_tokens == num_loss_tokens <= context
            assert data.num_tokens(id) == num_tokens
            parts.setdefault(id >> 21, []).append((id, *read_whole(data, id, num_tokens)))
        documents = []
        for pieces in parts.values():
            assert [id & ((1 << 21) - 1) for id, *_ in pieces] == list(range(len(pieces)))
            assert all(len(inputs) == context for _, inputs, _ in pieces[:-1])
            inputs = [token for _, of_piece, _ in pieces for token in of_piece]
            targets = [token for _, _, of_piece in pieces for token in of_piece]
            assert inputs[1:] == targets[:-1]
            assert targets[-1] == EOD
            documents.append(np.array([*inputs, EOD], np.int32).tobytes())
        assert sorted(documents) == texts_of(corpus, "small", "train")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**7), st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_steps_of_any_size_are_parts_of_the_same_whole(corpus: Path, first: int, sizes: list[int]) -> None:
    data = DocumentDataset(corpus, "train", 50, seed=1, domain_weights={"big": 2.0, "small": 1.0})
    whole = data.table(first, sum(sizes))
    parts = []
    for size in sizes:
        parts.append(data.table(first, size))
        first += size
    rows = sorted(row for part in parts for row in part.tolist())
    assert rows == sorted(whole.tolist())
    assert len({row[0] for row in rows}) == len(rows)


def test_domains_have_their_shares_of_tokens(corpus: Path) -> None:
    data = DocumentDataset(corpus, "train", 50, domain_weights={"big": 3.0, "small": 1.0})
    table_N3 = data.table(0, 60_000)
    tokens = dict.fromkeys(data.domains, 0)
    for id, num_tokens, _ in table_N3.tolist():
        tokens[data.domain_of(id)] += num_tokens
    assert tokens["big"] / sum(tokens.values()) == pytest.approx(0.75, abs=0.02)
    assert sum(tokens.values()) == pytest.approx(60_000, rel=0.06)  # without the EOD of each


def test_the_seed_orders_documents_of_training_alone(corpus: Path) -> None:
    tables = [DocumentDataset(corpus, "train", 50, seed=seed).table(0, 4000)[:, 1].tolist() for seed in (1, 2, 1)]
    assert tables[0] == tables[2] != tables[1]
    one, two = (DocumentDataset(corpus, "validation", 50, seed=seed) for seed in (1, 2))
    assert one.num_rows is not None
    assert one.table(0, one.num_rows).tolist() == two.table(0, one.num_rows).tolist()


def test_validation_has_every_document_once_and_ends(corpus: Path) -> None:
    data = DocumentDataset(corpus, "validation", 10_000)
    assert data.num_rows is not None
    table_N3 = np.concatenate([data.table(first, 3) for first in range(0, data.num_rows + 9, 3)])
    assert len(table_N3) == data.num_rows
    for name in ("big", "small"):
        found = [
            np.array([*read_whole(data, id, size)[0], EOD], np.int32).tobytes()
            for id, size, _ in table_N3.tolist()
            if data.domain_of(id) == name
        ]
        assert sorted(found) == texts_of(corpus, name, "validation")
    whole = PackedDataset(corpus, "validation", 64).manifest
    assert data.entropies() == whole.entropies


def test_ranks_read_their_pieces_alone(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DocumentDataset(corpus, "train", 300)
    loader = DocumentLoader(data)
    longest = max(loader.sequences(0, 3000), key=lambda sequence: sequence.num_tokens)
    alone = loader.batch(plan_data([longest], 1, 1), 0, 0)
    plan = SequencePlan.of_items([longest], [Item(0, 0, (longest.id,), (0, 1, 2))], num_ranks=3, capacity=300)
    read: list[tuple[int, int]] = []
    whole = DocumentDataset.read

    def noted(self: DocumentDataset, sequence_id: int, start: int, stop: int) -> object:
        read.append((start, stop))
        return whole(self, sequence_id, start, stop)

    monkeypatch.setattr(DocumentDataset, "read", noted)
    batches = [loader.batch(plan, rank, 0) for rank in range(3)]
    assert sum(stop - start for start, stop in read) == longest.num_tokens
    tokens = sorted(
        (place, token, target)
        for batch in batches
        for place, token, target in zip(
            batch.token_gids()[:, 1].tolist(), batch.token_id_T.tolist(), batch.target_T.tolist(), strict=True
        )
    )
    assert [token[1] for token in tokens] == alone.token_id_T.tolist()
    assert [token[2] for token in tokens] == alone.target_T.tolist()


def test_a_long_document_may_leave_a_step_empty(corpus: Path) -> None:
    data = DocumentDataset(corpus, "train", 1000, domain_weights={"big": 1.0})
    sizes = [len(data.table(place, 1)) for place in range(400)]
    assert set(sizes) == {0, 1}
    assert DocumentLoader(data).sequences(sizes.index(0), 1) == []


def test_documents_of_a_step_are_foretold(corpus: Path) -> None:
    data = DocumentDataset(corpus, "train", 10_000, domain_weights={"big": 3.0, "small": 1.0})
    sizes = [len(data.table(place, 1_000)) for place in range(0, 300_000, 1_000)]
    assert data.expected_documents(1_000) == pytest.approx(sum(sizes) / len(sizes), rel=0.02)


def test_bad_arguments(corpus: Path) -> None:
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        DocumentDataset(corpus, "train", 0)
    with pytest.raises(ValueError, match=r"names 'bigg', but .* did you mean 'big'"):
        DocumentDataset(corpus, "train", 9, domain_weights={"bigg": 1.0})
    with pytest.raises(ValueError, match="first must be at least 0, got -1"):
        DocumentDataset(corpus, "train", 9).table(-1, 4)
