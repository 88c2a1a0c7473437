"""Awkward batches, once as the parallel run wants them (packed rows) and once as the oracle does (documents).

Shapes: S tokens per packed row, B rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.oracle import Document, MicroBatch
from moetrain.sequence import PackedBatch, SequencePlan, plan_data
from moetrain.sequence import Sequence as PlannedSequence


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row: documents one after another, then padding. All int64 [S]."""

    id: int
    token_id_S: Tensor
    target_S: Tensor
    position_S: Tensor
    document_S: Tensor

    def documents(self) -> tuple[Document, ...]:
        """The row taken apart."""
        found = []
        for document in range(int(self.document_S.max()) + 1):
            inside = self.document_S == document
            found.append(Document(self.token_id_S[inside], self.target_S[inside], self.position_S[inside]))
        return tuple(found)


def make_rows(seed: int, step: int, count: int, *, seq_len: int, vocab_size: int) -> list[Row]:
    """Rows of one step, with uneven documents (some of one token), padding and numbers of loss tokens.

    Every third row has next to no loss tokens, row 0 always has some, and no row is all padding.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)

    def draw(low: int, high: int, size: tuple[int, ...] = (1,)) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    rows = []
    for row_idx in range(count):
        num_valid = seq_len - int(draw(0, seq_len // 3))
        document_S = torch.full((seq_len,), -1)
        position_S = torch.zeros(seq_len, dtype=torch.int64)
        start, document = 0, 0
        while start < num_valid:
            longest = 1 if document == 1 else num_valid - start
            stop = start + int(draw(1, longest + 1))
            document_S[start:stop] = document
            position_S[start:stop] = torch.arange(stop - start)
            start, document = stop, document + 1
        valid_S = document_S >= 0
        kept_S = draw(0, 8, (seq_len,)) < (1 if row_idx % 3 == 2 else 6)
        kept_S[0] |= row_idx == 0
        target_S = draw(0, vocab_size, (seq_len,)).where(valid_S & kept_S, torch.tensor(-1))
        token_id_S = draw(0, vocab_size, (seq_len,)).where(valid_S, torch.tensor(0))
        rows.append(Row(step * count + row_idx, token_id_S, target_S, position_S, document_S))
    return rows


def plan_rows(rows: Sequence[Row], num_ranks: int, micro_batch: int) -> SequencePlan:
    """Where the rows of one step go."""
    sequences = [
        PlannedSequence(row.id, int((row.document_S >= 0).sum()), int((row.target_S >= 0).sum())) for row in rows
    ]
    return plan_data(sequences, num_ranks, micro_batch)


def packed_batch(plan: SequencePlan, rows: Mapping[int, Row], rank: int, round_idx: int, seq_len: int) -> PackedBatch:
    """What ``rank`` computes in one round; no rows where its lane is empty."""
    item = plan.item_at(rank, round_idx)
    if item is None:
        return PackedBatch.empty(seq_len)
    mine = [rows[row_id] for row_id in item.sequence_ids]
    return PackedBatch(
        token_id_BS=torch.stack([row.token_id_S for row in mine]),
        target_BS=torch.stack([row.target_S for row in mine]),
        position_BS=torch.stack([row.position_S for row in mine]),
        document_BS=torch.stack([row.document_S for row in mine]),
        sequence_id_B=torch.tensor([row.id for row in mine]),
    )


def oracle_batches(
    plan: SequencePlan, rows: Mapping[int, Row], domains: Sequence[tuple[int, ...]] | None = None
) -> list[MicroBatch]:
    """The same micro-batches for the oracle: one per domain and round, without empty ones.

    Args:
        plan: of the step.
        rows: by id.
        domains: ranks whose micro-batches of a round are one domain; each rank alone if left out.
    """
    batches = []
    for round_idx in range(plan.num_rounds):
        for ranks in domains or [(rank,) for rank in range(len(plan.rank_gids))]:
            items = [plan.item_at(rank, round_idx) for rank in ranks]
            documents = [
                [document for row_id in item.sequence_ids for document in rows[row_id].documents()] if item else []
                for item in items
            ]
            joined = tuple(document for part in documents for document in part)
            if joined:
                batches.append(MicroBatch(joined, tuple(map(len, documents)), round_idx))
    return batches
