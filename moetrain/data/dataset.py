"""Packed rows of a prepared dataset. Shapes: S tokens of a full row, T of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.config.errors import require_at_least
from moetrain.data.domains import Domains, Split
from moetrain.data.entropy import Entropies
from moetrain.data.mixing import PERIOD, Interleaving, apportion
from moetrain.data.stream import shuffled


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row: parts of documents, one after another. A row of T tokens is shorter than S at the end of a set alone.

    Attributes:
        token_id_T: int64 inputs.
        target_T: int64 next tokens; -1 where the input is EOD, since what follows is another document.
        borders: where documents begin in the row, and T; the first one is 0, where one may go on.
        domain: name of the domain that it comes from.
    """

    token_id_T: NDArray[np.int64]
    target_T: NDArray[np.int64]
    borders: tuple[int, ...]
    domain: str


class _RowOrder:
    """Which piece of a domain's stream each of its rows takes: one shuffle per epoch, none where an epoch is a row."""

    def __init__(self, name: str, rows_per_epoch: int, seed: int | None) -> None:
        """``seed`` None gives every epoch the same order, which no seed changes."""
        self._name = name
        self._rows_per_epoch = max(1, rows_per_epoch)
        self._seed = seed
        self._epoch = -1
        self._piece_R = np.empty(0, np.int64)

    def piece(self, row: int) -> int:
        epoch, place = divmod(row, self._rows_per_epoch)
        if epoch != self._epoch:
            purpose = ("validation rows", self._name) if self._seed is None else ("rows", self._seed, self._name, epoch)
            self._piece_R, self._epoch = shuffled(self._rows_per_epoch, *purpose), epoch
        return epoch * self._rows_per_epoch + int(self._piece_R[place])


class PackedDataset:
    """Rows by number, the same whatever the ranks, the batch size and the order in which rows are asked for.

    Training is endless: documents are shuffled anew in each epoch by (seed, domain, epoch) and laid end to end, and
    piece p of a domain covers the tokens [p·S, p·S + S] of that stream, one more than S, so that each piece's last
    target is the next piece's first input. Rows take the pieces in shuffled order, epoch by epoch: a batch of
    neighbouring pieces of a few long documents would teach much less than one drawn from everywhere. Validation holds
    every token once, in an order that no seed changes; the last row of a domain may be shorter.
    """

    def __init__(
        self,
        path: Path,
        split: Split,
        seq_len: int,
        seed: int = 0,
        domain_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Open the files.

        Args:
            path: a folder that ``prepare`` wrote.
            split: ``train`` or ``validation``.
            seq_len: S.
            seed: of the order of training documents.
            domain_weights: shares of training rows by domain; a domain that is not named gets none. Empty: in
                proportion to tokens. Validation takes the same domains, in proportion to their tokens.
        """
        require_at_least("seq_len", seq_len, 1)
        self._opened = opened = Domains.open(path, split, seed, domain_weights)
        self.manifest, self.tokenizer, self.split = opened.manifest, opened.tokenizer, opened.split
        self.seq_len = seq_len
        self.domains = opened.names
        self._streams = opened.streams
        rows = [-(-(stream.num_tokens - 1) // seq_len) for stream in self._streams]
        shares = apportion(list(opened.weights.values()), PERIOD) if split == "train" else rows
        self._interleaving = Interleaving(shares)
        self._order = [
            _RowOrder(name, stream.num_tokens // seq_len, seed) if split == "train" else _RowOrder(name, num_rows, None)
            for name, stream, num_rows in zip(self.domains, self._streams, rows, strict=True)
        ]

    @property
    def num_rows(self) -> int | None:
        """Rows of the validation set; None for training, which is endless."""
        return None if self.split == "train" else len(self._interleaving)

    def locate(self, row_id: int) -> tuple[str, int]:
        """(domain, first token of the row in that domain's stream)."""
        domain, start = self._locate(row_id)
        return self.domains[domain], start

    def num_tokens(self, row_id: int) -> int:
        """T of a row."""
        domain, start = self._locate(row_id)
        return self._num_inputs(domain, start)

    def num_loss_tokens(self, row_id: int) -> int:
        """Inputs of a row that have a target; found without reading its tokens."""
        domain, start = self._locate(row_id)
        num_inputs = self._num_inputs(domain, start)
        return num_inputs - self._streams[domain].num_ends(start, num_inputs)

    def row(self, row_id: int) -> PackedRow:
        """Read one row.

        Raises:
            IndexError: beyond the validation set.
            ValueError: for an id outside the vocabulary.
        """
        domain, start = self._locate(row_id)
        num_inputs = self._num_inputs(domain, start)
        stream = self._streams[domain].read(start, num_inputs + 1)
        inputs = stream[:-1]
        ended = inputs == self.tokenizer.eod_id
        begins = (np.flatnonzero(ended[:-1]) + 1).tolist()
        target = np.where(ended, -1, stream[1:])
        return PackedRow(inputs, target, (0, *begins, num_inputs), self.domains[domain])

    def entropies(self) -> Entropies:
        """What a model must beat on this validation set; see ``Domains.entropies``."""
        return self._opened.entropies()

    def _locate(self, row_id: int) -> tuple[int, int]:
        if row_id < 0 or (self.num_rows is not None and row_id >= self.num_rows):
            end = "infinity" if self.num_rows is None else self.num_rows
            raise IndexError(f"{self.split} row must be in [0, {end}), got {row_id}")
        domain, row = self._interleaving.locate(row_id)
        return domain, self.seq_len * self._order[domain].piece(row)

    def _num_inputs(self, domain: int, start: int) -> int:
        if self.split == "train":
            return self.seq_len
        return min(self.seq_len, self._streams[domain].num_tokens - 1 - start)
