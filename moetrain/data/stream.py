"""One domain as a stream of tokens in an order that a seed fixes. Shapes: S tokens per row, N documents."""

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.data.indexed import IndexedReader

_EPOCHS_KEPT = 2  # a row may cross from one epoch into the next


def shuffled(num_items: int, *purpose: str | int) -> NDArray[np.int64]:
    """A permutation of range(num_items) that depends on ``purpose`` alone.

    It sorts raw Philox words, since numpy promises the same words in every version, but not the same permutations.
    """
    key = hashlib.sha256("\0".join(map(str, purpose)).encode()).digest()[:16]
    words = np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64)).random_raw(num_items)
    return np.argsort(words, kind="stable")


class _Epoch:
    """Documents in the order of one epoch.

    ``edge_N1`` are their borders in tokens, from 0 to the stream's length; ``end_M`` the places of their last tokens,
    for those M that have any.
    """

    def __init__(self, reader: IndexedReader, order_N: NDArray[np.int64]) -> None:
        self.order_N = order_N
        self.edge_N1 = np.concatenate([[0], np.cumsum(reader.size_N[order_N])])
        self.end_M = self.edge_N1[1:][reader.size_N[order_N] > 0] - 1


class TokenStream:
    """All documents of a reader one after another, epoch after epoch, each epoch in an order of its own.

    Every stored document ends in EOD, so the stream needs no other borders. Access is random: finding a token costs a
    binary search, and the first access to an epoch one sort of its documents.
    """

    def __init__(self, reader: IndexedReader, name: str, seed: int | None, vocab_size: int) -> None:
        """``seed`` None keeps the stored order in every epoch."""
        self.name = name
        self.num_tokens = reader.num_tokens
        self._reader = reader
        self._seed = seed
        self._vocab_size = vocab_size
        self._epochs: dict[int, _Epoch] = {}
        self._making = threading.Lock()  # readers ahead are threads
        if self.num_tokens == 0:
            raise ValueError(f"domain {name}: {reader.prefix} holds no tokens; leave the domain out or add text")

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens [count] from ``start`` of the endless stream.

        Raises:
            ValueError: for an id outside the vocabulary, naming document and offset.
        """
        pieces = [self._read_epoch(epoch, begin, end) for epoch, begin, end in self._ranges(start, count)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def documents(self) -> Iterator[NDArray[Any]]:
        """Tokens of each document, its EOD included, in the stored order."""
        return map(self._reader.sequence, range(len(self._reader)))

    def num_documents(self, least: int) -> int:
        """Documents of at least so many tokens, EOD included."""
        return int(np.count_nonzero(self._reader.size_N >= least))

    def num_ends(self, start: int, count: int) -> int:
        """How many documents end, with their EOD, among ``count`` tokens from ``start``; reads no tokens."""
        ends = 0
        for epoch, begin, end in self._ranges(start, count):
            end_M = self._epoch(epoch).end_M
            ends += int(np.searchsorted(end_M, end) - np.searchsorted(end_M, begin))
        return ends

    def between(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents whose first token lies in [start, stop) of the endless stream; reads no tokens.

        Returns:
            Their numbers, which count on from epoch to epoch and are what ``read_document`` takes, and their tokens,
            EOD included; both int64 and in the order of the stream.
        """
        numbers, sizes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for epoch_idx, begin, end in self._ranges(start, stop - start):
            edge_N1 = self._epoch(epoch_idx).edge_N1
            first, last = np.searchsorted(edge_N1[:-1], (begin, end))
            numbers.append(epoch_idx * len(self._reader) + np.arange(first, last))
            sizes.append(np.diff(edge_N1[first : last + 1]))
        return np.concatenate(numbers), np.concatenate(sizes)

    def read_document(self, number: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of one document, its EOD being the last one it has."""
        epoch_idx, place = divmod(number, len(self._reader))
        edge = int(self._epoch(epoch_idx).edge_N1[place])
        return self._read_epoch(epoch_idx, edge + start, edge + stop)

    def document_size(self, number: int) -> int:
        """Tokens of one document, EOD included."""
        epoch_idx, place = divmod(number, len(self._reader))
        edge_N1 = self._epoch(epoch_idx).edge_N1
        return int(edge_N1[place + 1] - edge_N1[place])

    def _ranges(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """(epoch, begin, end) of the pieces that make up a range."""
        ranges = []
        while count > 0:
            epoch, begin = divmod(start, self.num_tokens)
            end = min(begin + count, self.num_tokens)
            ranges.append((epoch, begin, end))
            start, count = start + end - begin, count - (end - begin)
        return ranges

    def _read_epoch(self, epoch_idx: int, begin: int, end: int) -> NDArray[np.int64]:
        epoch = self._epoch(epoch_idx)
        edge_N1 = epoch.edge_N1
        first = int(np.searchsorted(edge_N1, begin, side="right")) - 1
        last = int(np.searchsorted(edge_N1, end, side="left"))
        documents = epoch.order_N[first:last]
        length = np.minimum(edge_N1[first + 1 : last + 1], end) - np.maximum(edge_N1[first:last], begin)
        shift = self._reader.start_N[documents] - edge_N1[first:last]  # from place in the epoch to place in the file
        place = np.arange(begin, end) + np.repeat(shift, length)
        tokens = self._reader.tokens[place].astype(np.int64)
        bad = (tokens < 0) | (tokens >= self._vocab_size)
        if bad.any():
            self._refuse(
                int(place[bad.argmax()]), int(tokens[bad.argmax()]), np.repeat(documents, length)[bad.argmax()]
            )
        return tokens

    def _refuse(self, place: int, token: int, document: int) -> None:
        raise ValueError(
            f"domain {self.name}: token {token} at offset {place - self._reader.start_N[document]} of document "
            f"{document} in {self._reader.prefix}.bin must be in [0, {self._vocab_size}), the vocabulary; "
            "the file is damaged or was made with another tokenizer; prepare the dataset again"
        )

    def _epoch(self, epoch_idx: int) -> _Epoch:
        with self._making:
            return self._epoch_alone(epoch_idx)

    def _epoch_alone(self, epoch_idx: int) -> _Epoch:
        epoch = self._epochs.get(epoch_idx)
        if epoch is None:
            num_documents = len(self._reader)
            order_N = (
                np.arange(num_documents)
                if self._seed is None
                else shuffled(num_documents, "documents", self._seed, self.name, epoch_idx)
            )
            epoch = _Epoch(self._reader, order_N)
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[max(self._epochs, key=lambda kept: abs(kept - epoch_idx))]
            self._epochs[epoch_idx] = epoch
        return epoch
