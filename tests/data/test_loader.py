import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from moetrain.data.dataset import PackedDataset
from moetrain.data.loader import RowLoader
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.sequence import Item, PackedBatch, SequencePlan, plan_data

Tokens = list[tuple[int, ...]]  # of each token its row and place there, itself, its target and its position


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(1)
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / f"text/{i}").write_bytes(rng.randbytes(rng.randint(1, 200)))
    prepare([Source(name="text", path=tmp_path / "text")], tmp_path / "out", validation_fraction=0.2)
    return tmp_path / "out"


def tokens_of_step(loader: RowLoader, step: int, global_batch: int, num_ranks: int, micro_batch: int) -> Tokens:
    """All tokens that all ranks have in a step, in the order of rows."""
    plan = plan_data(loader.sequences_of_step(step, global_batch), num_ranks, micro_batch)
    batches = [loader.batch(plan, rank, k) for rank in range(num_ranks) for k in range(plan.num_rounds(rank))]
    assert sum(batch.num_loss_tokens for batch in batches) == plan.num_loss_tokens
    assert sum(batch.num_tokens for batch in batches) == plan.num_tokens
    return sorted(token for batch in batches for token in tokens_of(batch))


def tokens_of(batch: PackedBatch) -> Tokens:
    columns = (*batch.token_gids().unbind(1), batch.token_id_T, batch.target_T, batch.positions())
    return list(zip(*(column.tolist() for column in columns), strict=True))


def ids_of(tokens: Tokens) -> list[int]:
    return [token[2] for token in tokens]


@pytest.mark.parametrize("global_batch", [1, 6, 7])
def test_samples_do_not_depend_on_ranks(corpus: Path, global_batch: int) -> None:
    loader = RowLoader(PackedDataset(corpus, "train", 24, seed=2))
    for step in (0, 3):
        whole = tokens_of_step(loader, step, global_batch, 1, global_batch)
        rows = [step * global_batch + i for i in range(global_batch)]
        assert [token[:2] for token in whole] == [(row, place) for row in rows for place in range(24)]
        for num_ranks, micro_batch in ((2, 1), (3, 2), (8, 4)):
            fresh = RowLoader(PackedDataset(corpus, "train", 24, seed=2))
            assert tokens_of_step(fresh, step, global_batch, num_ranks, micro_batch) == whole
    other = tokens_of_step(RowLoader(PackedDataset(corpus, "train", 24, seed=3)), 0, 7, 1, 7)
    assert ids_of(other) != ids_of(tokens_of_step(loader, 0, 7, 1, 7))


def test_samples_do_not_depend_on_the_global_batch(corpus: Path) -> None:
    loader = RowLoader(PackedDataset(corpus, "train", 24))
    by_six = [token for step in range(4) for token in tokens_of_step(loader, step, 6, 2, 2)]
    by_eight = [token for step in range(3) for token in tokens_of_step(loader, step, 8, 2, 2)]
    assert by_six == by_eight
    assert [s.id for s in loader.sequences(20, 3)] == [20, 21, 22]


def test_empty_lanes_have_no_tokens(corpus: Path) -> None:
    loader = RowLoader(PackedDataset(corpus, "train", 24))
    plan = plan_data(loader.sequences_of_step(0, 2), 4, 1)
    batch = loader.batch(plan, 3, 0)
    assert (batch.num_tokens, batch.num_loss_tokens, batch.pieces) == (0, 0, ())


def test_documents_of_a_row_are_pieces_of_their_own(corpus: Path) -> None:
    dataset = PackedDataset(corpus, "train", 24)
    loader = RowLoader(dataset)
    batch = loader.batch(plan_data(loader.sequences(0, 12), 1, 12), 0, 0)
    want = [(row, *pair) for row in range(12) for pair in pairwise(dataset.row(row).borders)]
    assert [(piece.sequence, piece.start, piece.stop) for piece in batch.pieces] == want
    assert len(batch.pieces) > 12
    ends = batch.token_id_T == dataset.tokenizer.eod_id
    begins = batch.positions() == 0
    assert bool(begins[1:][ends[:-1]].all())


def test_validation_ends(corpus: Path) -> None:
    loader = RowLoader(PackedDataset(corpus, "validation", 24))
    num_rows = loader.dataset.num_rows
    assert num_rows is not None
    assert [s.id for s in loader.sequences(0, 10**6)] == list(range(num_rows))
    assert loader.sequences(num_rows, 5) == []
    assert loader.sequences(num_rows + 9, 5) == []
    whole = tokens_of_step(loader, 0, 10**6, 3, 2)
    manifest = loader.dataset.manifest.domains["text"].validation
    assert len(whole) == manifest.tokens - 1  # the last token is nobody's input
    assert sum(token[3] >= 0 for token in whole) == manifest.tokens - manifest.documents


def test_a_gang_reads_each_token_once(corpus: Path) -> None:
    loader = RowLoader(PackedDataset(corpus, "train", 24))
    whole = tokens_of(loader.batch(plan_data(loader.sequences(0, 3), 1, 3), 0, 0))
    gang = SequencePlan.of_items(loader.sequences(0, 3), [Item(0, 0, (0, 1, 2), (0, 1, 2))], num_ranks=3, capacity=72)
    shares = [tokens_of(loader.batch(gang, rank, 0)) for rank in range(3)]
    assert sorted(token for share in shares for token in share) == sorted(whole)
    assert max(map(len, shares)) < len(whole)


def test_a_plan_of_other_data_is_refused(corpus: Path) -> None:
    loader = RowLoader(PackedDataset(corpus, "train", 24))
    first, second = loader.sequences(0, 2)
    changed = [replace(first, num_tokens=25), second]
    with pytest.raises(ValueError, match="sequence 0 has 24 tokens, but the plan says 25; give all ranks the data"):
        loader.batch(plan_data(changed, 1, 2), 0, 0)
