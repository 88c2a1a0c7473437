import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.data.dataset import PackedDataset
from moetrain.data.indexed import IndexedReader
from moetrain.data.loader import StepLoader
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.sequence import Item, PackedBatch, SequencePlan, plan_data

MATRICES = ("token_id_BS", "target_BS", "position_BS", "document_BS")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = random.Random(1)
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / f"text/{i}").write_bytes(rng.randbytes(rng.randint(1, 200)))
    prepare([Source(name="text", path=tmp_path / "text")], tmp_path / "out", validation_fraction=0.2)
    return tmp_path / "out"


def rows_of_step(loader: StepLoader, step: int, global_batch: int, num_ranks: int, micro_batch: int) -> PackedBatch:
    """All batches of all ranks of a step, put in the order of their rows."""
    plan = plan_data(loader.sequences_of_step(step, global_batch), num_ranks, micro_batch)
    batches = [loader.batch(plan, rank, k) for rank in range(num_ranks) for k in range(plan.num_rounds)]
    assert sum(batch.num_loss_tokens for batch in batches) == plan.num_loss_tokens
    assert sum(batch.num_tokens for batch in batches) == plan.num_tokens
    ids = torch.cat([batch.sequence_id_B for batch in batches])
    order = ids.argsort()
    token_id, target, position, document = (torch.cat([getattr(b, name) for b in batches])[order] for name in MATRICES)
    return PackedBatch(token_id, target, position, document, ids[order])


@pytest.mark.parametrize("global_batch", [1, 6, 7])
def test_samples_do_not_depend_on_ranks(corpus: Path, global_batch: int) -> None:
    loader = StepLoader(PackedDataset(corpus, "train", 24, seed=2))
    for step in (0, 3):
        whole = rows_of_step(loader, step, global_batch, 1, global_batch)
        assert whole.sequence_id_B.tolist() == [step * global_batch + i for i in range(global_batch)]
        for num_ranks, micro_batch in ((2, 1), (3, 2), (8, 4)):
            fresh = StepLoader(PackedDataset(corpus, "train", 24, seed=2))
            parted = rows_of_step(fresh, step, global_batch, num_ranks, micro_batch)
            for name in (*MATRICES, "sequence_id_B"):
                assert torch.equal(getattr(parted, name), getattr(whole, name))
    other = rows_of_step(StepLoader(PackedDataset(corpus, "train", 24, seed=3)), 0, 7, 1, 7)
    base = rows_of_step(loader, 0, 7, 1, 7)
    assert not torch.equal(other.token_id_BS, base.token_id_BS)


def test_samples_do_not_depend_on_the_global_batch(corpus: Path) -> None:
    loader = StepLoader(PackedDataset(corpus, "train", 24))
    by_six = [rows_of_step(loader, step, 6, 2, 2).token_id_BS for step in range(4)]
    by_eight = [rows_of_step(loader, step, 8, 2, 2).token_id_BS for step in range(3)]
    assert torch.equal(torch.cat(by_six), torch.cat(by_eight))
    assert [s.id for s in loader.sequences(20, 3)] == [20, 21, 22]


def test_empty_lanes_have_no_rows(corpus: Path) -> None:
    loader = StepLoader(PackedDataset(corpus, "train", 24))
    plan = plan_data(loader.sequences_of_step(0, 2), 4, 1)
    batch = loader.batch(plan, 3, 0)
    assert batch.token_id_BS.shape == (0, 24)
    assert (batch.num_tokens, batch.num_loss_tokens) == (0, 0)


def test_validation_ends(corpus: Path) -> None:
    loader = StepLoader(PackedDataset(corpus, "validation", 24))
    num_rows = loader.dataset.num_rows
    assert num_rows is not None
    assert [s.id for s in loader.sequences(0, 10**6)] == list(range(num_rows))
    assert loader.sequences(num_rows, 5) == []
    assert loader.sequences(num_rows + 9, 5) == []
    whole = rows_of_step(loader, 0, 10**6, 3, 2)
    manifest = loader.dataset.manifest.domains["text"].validation
    assert whole.num_tokens == manifest.tokens - 1  # the last token is nobody's input
    assert whole.num_loss_tokens == manifest.tokens - manifest.documents
    assert whole.valid().sum() == whole.num_tokens


def test_items_over_several_ranks_are_refused(corpus: Path) -> None:
    loader = StepLoader(PackedDataset(corpus, "train", 24))
    gang = SequencePlan.build(
        loader.sequences(0, 1), [Item(0, 0, (0,), (0, 1))], num_ranks=2, num_rounds=1, capacity=24
    )
    with pytest.raises(ValueError, match=r"item 0 spans ranks \(0, 1\)"):
        loader.batch(gang, 0, 0)


def test_a_plan_of_other_data_is_refused(corpus: Path) -> None:
    loader = StepLoader(PackedDataset(corpus, "train", 24))
    sequences = loader.sequences(0, 2)
    changed = [replace(sequences[0], num_loss_tokens=sequences[0].num_loss_tokens - 1), sequences[1]]
    with pytest.raises(
        ValueError, match=r"rows \(0, 1\) have \d+ loss tokens, the plan says \d+; documents must end in EOD"
    ):
        loader.batch(plan_data(changed, 1, 2), 0, 0)


def test_documents_without_eod_are_noticed(corpus: Path) -> None:
    loader = StepLoader(PackedDataset(corpus, "train", 24))
    with (corpus / "text.train.bin").open("r+b") as file:  # in place, so that the loader's mapping sees it
        file.write(bytes(2 * IndexedReader(corpus / "text.train").num_tokens))
    sequences = loader.sequences(0, 20)
    with pytest.raises(ValueError, match="documents must end in EOD"):
        loader.batch(plan_data(sequences, 1, 20), 0, 0)
