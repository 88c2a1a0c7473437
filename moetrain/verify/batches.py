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


@dataclass(frozen=True, slots=True)
class Domains:
    """Which ranks' tokens of a round are one domain of rounding, or of capacity.

    Args:
        tp: ranks that share a lane: rank lane * tp + i has the i-th of tp equal parts of its places.
        domain_of: rank -> domain.
    """

    tp: int
    domain_of: Mapping[int, int]

    def of_place(self, lane: int, place: int, num_places: int) -> int:
        """The domain of one place of a lane's micro-batch of ``num_places``, padding included."""
        return self.domain_of[lane * self.tp + place // -(-num_places // self.tp)]


def oracle_batches(plan: SequencePlan, rows: Mapping[int, Row], domains: Domains | None = None) -> list[MicroBatch]:
    """The same micro-batches for the oracle, without empty ones: one per lane and round, or per round with domains.

    Args:
        plan: of the step; its ranks are lanes.
        rows: by id.
        domains: of methods that look at sets of tokens; None where there are none.
    """
    lanes = range(len(plan.rank_gids))
    together = [tuple(lanes)] if domains is not None else [(lane,) for lane in lanes]
    batches = []
    for round_idx in range(plan.num_rounds):
        for group in together:
            rows_of = {lane: _rows_of(plan, rows, lane, round_idx) for lane in group}
            documents = [[document for row in rows_of[lane] for document in row.documents()] for lane in group]
            joined = tuple(document for part in documents for document in part)
            if not joined:
                continue
            counts = tuple(map(len, documents))
            if domains is None:
                batches.append(MicroBatch(joined, counts, round_idx))
                continue
            domain_T = tuple(domain for lane in group for domain in _domains_of(domains, lane, rows_of[lane]))
            batches.append(MicroBatch(joined, counts, round_idx, domain_T, _slots(domains, rows_of)))
    return batches


def _rows_of(plan: SequencePlan, rows: Mapping[int, Row], lane: int, round_idx: int) -> list[Row]:
    item = plan.item_at(lane, round_idx)
    return [] if item is None else [rows[row_id] for row_id in item.sequence_ids]


def _domains_of(domains: Domains, lane: int, rows: Sequence[Row]) -> list[int]:
    """The domain of each of a lane's tokens, documents one after another."""
    num_places = sum(len(row.document_S) for row in rows)
    found, first = [], 0
    for row in rows:
        document_S = row.document_S.tolist()
        for document in range(max(document_S) + 1):
            places = [first + place for place, inside in enumerate(document_S) if inside == document]
            found += [domains.of_place(lane, place, num_places) for place in places]
        first += len(document_S)
    return found


def _slots(domains: Domains, rows_of: Mapping[int, Sequence[Row]]) -> tuple[int, ...]:
    """Places of each domain: every rank of a tp group has as many, the last ones may be beyond the micro-batch."""
    slots = [0] * (max(domains.domain_of.values()) + 1)
    for lane, rows in rows_of.items():
        each = -(-sum(len(row.document_S) for row in rows) // domains.tp)
        for part in range(domains.tp):
            slots[domains.domain_of[lane * domains.tp + part]] += each
    return tuple(slots)
