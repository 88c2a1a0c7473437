"""What a model must beat: the empirical entropies of bytes given none, one or two bytes before them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22  # bytes folded into the tables at once


@dataclass(frozen=True, slots=True)
class Entropies:
    """Nats per byte, and the number of bytes they were measured on; all zero where there were none."""

    bytes: int = 0
    unigram: float = 0.0
    bigram: float = 0.0
    trigram: float = 0.0


class ContextCounts:
    """Counts bytes, pairs and triples that lie inside one document."""

    def __init__(self) -> None:
        self._count = [np.zeros(256**order, np.int64) for order in (1, 2, 3)]
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def add(self, document: bytes) -> None:
        """Count one document."""
        self._waiting.append(document)
        self._waiting_bytes += len(document)
        if self._waiting_bytes >= _CHUNK:
            self._fold()

    def merge(self, other: "ContextCounts") -> None:
        """Add what ``other`` has counted."""
        self._fold()
        other._fold()
        for mine, theirs in zip(self._count, other._count, strict=True):
            mine += theirs

    def entropies(self) -> Entropies:
        """Plug-in estimates: H(X), H(X | byte before), H(X | two bytes before), over these very bytes."""
        self._fold()
        values = [_conditional(count.reshape(-1, 256)) for count in self._count]
        return Entropies(int(self._count[0].sum()), *values)

    def _fold(self) -> None:
        if not self._waiting_bytes:
            return
        raw = np.frombuffer(b"".join(self._waiting), np.uint8).astype(np.int32)
        sizes = np.array([len(document) for document in self._waiting])
        position = np.arange(len(raw)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # inside its document
        code = raw
        for order, count in enumerate(self._count):
            if order:
                code = (raw[:-order] << (8 * order)) | code[1:]
            found = np.bincount(code[position[order:] >= order])
            count[: len(found)] += found
        self._waiting, self._waiting_bytes = [], 0


def _conditional(count_CX: NDArray[np.int64]) -> float:
    """H(X | C) = (sum_c n_c ln n_c - sum_cx n_cx ln n_cx) / n."""
    total = count_CX.sum()
    if total == 0:
        return 0.0
    return max(0.0, float((_n_log_n(count_CX.sum(axis=1)) - _n_log_n(count_CX[count_CX > 0])) / total))


def _n_log_n(count: NDArray[np.int64]) -> float:
    positive = count[count > 0].astype(np.float64)
    return float((positive * np.log(positive)).sum())
