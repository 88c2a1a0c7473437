"""Awkward batches, once as the parallel run wants them (rows, or pieces of them) and once as the oracle does.

Shapes: T tokens of a row, S of a full one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moetrain.data.entropy import Entropies
from moetrain.data.loader import StepLoader
from moetrain.oracle import Document, MicroBatch
from moetrain.sequence import Item, PackedBatch, SequencePlan, pack_item
from moetrain.sequence.plan import Ints


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: a packed row of documents one after another, or one document. Tensors are int64 [T]."""

    id: int
    token_id_T: Tensor
    target_T: Tensor
    borders: tuple[int, ...]  # where documents begin, and T

    def documents(self) -> tuple[Document, ...]:
        """The row taken apart."""
        return tuple(
            Document(self.token_id_T[begin:end], self.target_T[begin:end], torch.arange(end - begin))
            for begin, end in pairwise(self.borders)
        )

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """See ``moetrain.sequence.OpenSequence``."""
        return self.token_id_T[start:stop], self.target_T[start:stop]


class Rows:
    """Rows by id, as a ``SequenceSource``."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """``rows``: of one step."""
        self._rows = {row.id: row for row in rows}

    def open(self, sequence_id: int) -> Row:
        """See ``SequenceSource``."""
        return self._rows[sequence_id]


class RowsOfStep(StepLoader):
    """Rows of one step, as a training's data."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """``rows``: all of them, at any place."""
        self._table_N3, self._rows = table_of_rows(rows), Rows(rows)

    @property
    def num_rows(self) -> int | None:
        """See ``StepLoader``."""
        return None

    def table(self, first: int, count: int) -> Ints:
        """See ``StepLoader``."""
        return self._table_N3

    def open(self, sequence_id: int) -> Row:
        """See ``SequenceSource``."""
        return self._rows.open(sequence_id)

    def entropies(self) -> Entropies:
        """Nothing: tokens are drawn."""
        raise NotImplementedError("RowsOfStep.entropies: drawn tokens have no text; ask a loader of a dataset")


def make_rows(seed: int, step: int, count: int, *, seq_len: int, vocab_size: int) -> list[Row]:
    """Rows of one step, with uneven documents (some of one token), lengths and numbers of loss tokens.

    Every third row has next to no loss tokens, row 0 always has some, and no row is empty.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)

    def draw(low: int, high: int, size: tuple[int, ...] = (1,)) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    rows = []
    for row_idx in range(count):
        num_tokens = seq_len - int(draw(0, seq_len // 3))
        borders = [0]
        while borders[-1] < num_tokens:
            longest = 1 if len(borders) == 2 else num_tokens - borders[-1]
            borders.append(borders[-1] + int(draw(1, longest + 1)))
        kept_S = draw(0, 8, (seq_len,)) < (1 if row_idx % 3 == 2 else 6)
        kept_S[0] |= row_idx == 0
        target_S = draw(0, vocab_size, (seq_len,)).where(kept_S, torch.tensor(-1))
        token_id_S = draw(0, vocab_size, (seq_len,))
        rows.append(Row(step * count + row_idx, token_id_S[:num_tokens], target_S[:num_tokens], tuple(borders)))
    return rows


def make_documents(seed: int, step: int, *, num_tokens: int, longest: int, capacity: int, vocab_size: int) -> list[Row]:
    """Documents of one step, of very different lengths.

    There is the longest that there may be, some that ask for gangs of 3 and of 5 ranks, one that fills a rank, two of
    one token, and others of any length, of about ``num_tokens`` together.

    Args:
        seed: of the comparison.
        step: optimizer step.
        num_tokens: of all of them together, or as many as the first ones have.
        longest: tokens of the longest.
        capacity: tokens that a rank holds.
        vocab_size: ids are below it.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    sizes = [longest, 1, 1, capacity, *(size for size in (3 * capacity - 1, 5 * capacity - 2) if size < longest)]
    while sum(sizes) < num_tokens:
        sizes.append(int(torch.randint(1, min(longest, 2 * capacity) + 1, (), generator=generator)))
    order = torch.randperm(len(sizes), generator=generator).tolist()
    rows = []
    for place, index in enumerate(order):
        token_id_T, target_T = torch.randint(0, vocab_size, (2, sizes[index]), generator=generator).unbind()
        kept_T = torch.randint(0, 8, (sizes[index],), generator=generator) < (1 if place % 3 == 2 else 6)
        kept_T[0] |= place == 0
        id = step * 1000 + place
        rows.append(Row(id, token_id_T, target_T.where(kept_T, torch.tensor(-1)), (0, sizes[index])))
    return rows


def table_of_rows(rows: Sequence[Row]) -> Ints:
    """What a planner is told of rows."""
    table = [(row.id, len(row.token_id_T), int((row.target_T >= 0).sum())) for row in rows]
    return np.array(table, np.int64).reshape(-1, 3)


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
        """The domain of one of a lane's ``num_places`` tokens."""
        return self.domain_of[lane * self.tp + place // -(-num_places // self.tp)]


def oracle_batches(plan: SequencePlan, rows: Rows, domains: Domains | None = None) -> list[MicroBatch]:
    """The same micro-batches for the oracle, without empty ones: one per item, or per round with domains.

    Args:
        plan: of the step; its ranks are lanes.
        rows: of the step.
        domains: of methods that look at sets of tokens; None where there are none.
    """
    items = plan.all_items()
    if domains is None:
        return [MicroBatch(_documents(rows, item), round_idx=item.round) for item in items]
    rounds = sorted({item.round for item in items})
    return [_round_of(plan, rows, domains, [item for item in items if item.round == idx]) for idx in rounds]


def _documents(rows: Rows, item: Item) -> tuple[Document, ...]:
    return tuple(document for row_id in item.sequence_ids for document in rows.open(row_id).documents())


def _round_of(plan: SequencePlan, rows: Rows, domains: Domains, items: Sequence[Item]) -> MicroBatch:
    """All of one round, with the domain of each token."""
    lanes = {rank: pack_item(plan, item, rank, rows) for item in items for rank in item.ranks}
    domain_of = {
        (sequence, place): domains.of_place(lane, idx, batch.num_tokens)
        for lane, batch in lanes.items()
        for idx, (sequence, place) in enumerate(batch.token_gids().tolist())
    }
    row_ids = [row_id for item in items for row_id in item.sequence_ids]
    domain_T = [domain_of[row_id, place] for row_id in row_ids for place in range(len(rows.open(row_id).token_id_T))]
    documents = tuple(document for item in items for document in _documents(rows, item))
    counts = tuple(len(_documents(rows, item)) for item in items)
    return MicroBatch(documents, counts, items[0].round, tuple(domain_T), _slots(domains, lanes))


def _slots(domains: Domains, lanes: Mapping[int, PackedBatch]) -> tuple[int, ...]:
    """Places of each domain: every rank of a tp group has as many, the last ones may be beyond the micro-batch."""
    slots = [0] * (max(domains.domain_of.values()) + 1)
    for lane, batch in lanes.items():
        for part in range(domains.tp):
            slots[domains.domain_of[lane * domains.tp + part]] += -(-batch.num_tokens // domains.tp)
    return tuple(slots)
