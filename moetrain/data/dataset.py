"""Packed rows of a prepared dataset. Shapes: S tokens per row."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moetrain.config.errors import nearest, require, require_at_least, require_one_of
from moetrain.data.entropy import ContextCounts, Entropies
from moetrain.data.indexed import IndexedReader
from moetrain.data.manifest import SPLITS, Manifest
from moetrain.data.mixing import PERIOD, Interleaving, apportion
from moetrain.data.stream import TokenStream, shuffled

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row; every array is int64 [S].

    Attributes:
        token_id_S: inputs; the tokenizer's pad id behind ``num_tokens``.
        target_S: next tokens; -1 where the input is EOD (what follows is another document) and at padding.
        position_S: 0 at the row's first token and at each document's.
        document_S: index of the document inside the row; -1 at padding.
        num_tokens: inputs that are not padding.
        domain: name of the domain that it comes from.
    """

    token_id_S: NDArray[np.int64]
    target_S: NDArray[np.int64]
    position_S: NDArray[np.int64]
    document_S: NDArray[np.int64]
    num_tokens: int
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
    every token once, in an order that no seed changes; the last row of a domain is padded.
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
        require_one_of("split", split, SPLITS)
        require_at_least("seq_len", seq_len, 1)
        self.manifest = Manifest.read(path)
        self.tokenizer = self.manifest.make_tokenizer()
        self.split = split
        self.seq_len = seq_len
        weights = self._weights(dict(domain_weights or {}), path)
        self.domains = tuple(weights)
        order_seed = seed if split == "train" else None
        self._streams = [
            TokenStream(IndexedReader(Path(path) / f"{name}.{split}"), name, order_seed, self.tokenizer.vocab_size)
            for name in self.domains
        ]
        rows = [-(-(stream.num_tokens - 1) // seq_len) for stream in self._streams]
        shares = apportion(list(weights.values()), PERIOD) if split == "train" else rows
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
        """Inputs of a row that are not padding."""
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
        inputs, eod_id = stream[:-1], self.tokenizer.eod_id
        ended = inputs == eod_id
        document = np.concatenate([[0], np.cumsum(ended)[:-1]])
        place = np.arange(num_inputs)
        begin = np.maximum.accumulate(np.where(np.concatenate([[True], ended[:-1]]), place, 0))
        return PackedRow(
            self._padded(inputs, self.tokenizer.pad_id),
            self._padded(np.where(ended, -1, stream[1:]), -1),
            self._padded(place - begin, 0),
            self._padded(document, -1),
            num_inputs,
            self.domains[domain],
        )

    def entropies(self) -> Entropies:
        """What a model must beat on this validation set: entropies of the bytes of its own domains, and of no other.

        The manifest states those of each domain and of all together; those of several out of more are counted anew.
        """
        require_one_of("split", self.split, ("validation",))
        known = self.manifest.domains
        if all(name in self.domains for name, domain in known.items() if domain.validation.bytes):
            return self.manifest.entropies
        if len(self.domains) == 1:
            return known[self.domains[0]].entropies
        counts = ContextCounts()
        for stream in self._streams:
            for document in stream.documents():
                counts.add(self.tokenizer.decode_bytes(document))
        return counts.entropies()

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

    def _padded(self, values: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
        return np.pad(values, (0, self.seq_len - len(values)), constant_values=fill)

    def _weights(self, given: dict[str, float], path: Path) -> dict[str, float]:
        known = self.manifest.domains
        for name in given:
            near = nearest(name, known)
            require(
                name in known,
                f"data.domain_weights names {name!r}, but {path} has {', '.join(known)}; "
                + (f"did you mean {near!r}?" if near else "name one of these"),
            )
        used = [name for name in sorted(known) if not given or given.get(name, 0.0) > 0]
        tokens = {name: known[name].split(self.split).tokens for name in used}
        if self.split == "train" and given:
            return {name: given[name] for name in used}
        return {name: float(n) for name, n in tokens.items() if n > 1}  # one token has no target
