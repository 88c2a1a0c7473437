"""From places in the data to batches. Shapes: N sequences, T tokens of a rank and round (0 in an empty lane).

A loader keeps no position: step k of a run reads the places [k·G, (k + 1)·G), G the size of a batch. A run is resumed
by naming its next place, on however many ranks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moetrain.config.errors import require_at_least
from moetrain.data.dataset import PackedDataset, PackedRow
from moetrain.data.documents import DocumentDataset
from moetrain.data.entropy import Entropies
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.pack import OpenSequence, pack_item
from moetrain.sequence.plan import Ints, Sequence, SequencePlan


class StepLoader(ABC):
    """Tells a planner what there is, and reads what a SequencePlan asks of one rank in one round."""

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Sequences of the validation set; None for training, which is endless."""

    @abstractmethod
    def table(self, first: int, count: int) -> Ints:
        """The sequences of ``count`` places from ``first`` on, as int64 [N, 3] of id, tokens and loss tokens.

        There are fewer where the validation set ends. Equal on all ranks; no token is read.
        """

    @abstractmethod
    def open(self, sequence_id: int) -> OpenSequence:
        """See ``SequenceSource``."""

    @abstractmethod
    def entropies(self) -> Entropies:
        """What a model must beat on the validation set."""

    def sequences(self, first: int, count: int) -> list[Sequence]:
        """``table`` as objects."""
        return [Sequence(*row) for row in self.table(first, count).tolist()]

    def sequences_of_step(self, step: int, batch_size: int) -> list[Sequence]:
        """The global batch of ``step`` (from 0)."""
        return self.sequences(step * batch_size, batch_size)

    def batch(self, plan: SequencePlan, rank: int, round_idx: int) -> PackedBatch:
        """What ``rank`` computes in one round of ``plan``; no tokens where its lane is empty.

        Raises:
            ValueError: where a sequence is not what the plan was made from.
        """
        return pack_item(plan, plan.item_at(rank, round_idx), rank, self)


class RowLoader(StepLoader):
    """Packed rows; a place is a row."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    @property
    def num_rows(self) -> int | None:
        """See ``StepLoader``."""
        return self.dataset.num_rows

    def table(self, first: int, count: int) -> Ints:
        """See ``StepLoader``."""
        require_at_least("first", first, 0)
        stop = first + count if self.num_rows is None else min(first + count, self.num_rows)
        rows = [(i, self.dataset.num_tokens(i), self.dataset.num_loss_tokens(i)) for i in range(first, stop)]
        return np.array(rows, np.int64).reshape(-1, 3)

    def open(self, sequence_id: int) -> OpenSequence:
        """See ``SequenceSource``."""
        return _OpenRow(self.dataset.row(sequence_id))

    def entropies(self) -> Entropies:
        """See ``StepLoader``."""
        return self.dataset.entropies()


class DocumentLoader(StepLoader):
    """Documents; a place is a token that one may begin at, in validation a sequence."""

    def __init__(self, dataset: DocumentDataset) -> None:
        self.dataset = dataset

    @property
    def num_rows(self) -> int | None:
        """See ``StepLoader``."""
        return self.dataset.num_rows

    def table(self, first: int, count: int) -> Ints:
        """See ``StepLoader``."""
        return self.dataset.table(first, count)

    def open(self, sequence_id: int) -> OpenSequence:
        """See ``SequenceSource``."""
        return _OpenDocument(self.dataset, sequence_id, (0, self.dataset.num_tokens(sequence_id)))

    def entropies(self) -> Entropies:
        """See ``StepLoader``."""
        return self.dataset.entropies()


class _OpenRow:
    """A row, which is read whole: where a piece of it begins follows from the documents before."""

    def __init__(self, row: PackedRow) -> None:
        self.borders = row.borders
        self._token_id_T, self._target_T = torch.from_numpy(row.token_id_T), torch.from_numpy(row.target_T)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._token_id_T[start:stop], self._target_T[start:stop]


@dataclass(frozen=True, slots=True)
class _OpenDocument:
    """A document, of which the asked pieces alone are read."""

    dataset: DocumentDataset
    sequence_id: int
    borders: tuple[int, ...]

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        token_id_T, target_T = self.dataset.read(self.sequence_id, start, stop)
        return torch.from_numpy(token_id_T), torch.from_numpy(target_T)
