"""Which domain a row comes from: a function of the row's number alone, evenly spread at every scale."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PERIOD = 1 << 14  # rows after which the pattern of domains repeats; weights are rounded to 1 / PERIOD


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole shares of ``total`` in proportion to ``weights`` (largest remainder); a positive weight gets at least 1.

    >>> apportion([0.5, 0.3, 0.2, 0.0], 8)
    [4, 2, 2, 0]
    """
    positive = sum(weight > 0 for weight in weights)
    if positive == 0 or positive > total:
        raise ValueError(f"apportion: {positive} of the weights {list(weights)} are positive; 1 to {total} must be")
    ideal = [weight / sum(weights) * total for weight in weights]
    shares = [max(int(x), int(weight > 0)) for x, weight in zip(ideal, weights, strict=True)]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        least = 1 if step < 0 else 0
        open_to = [i for i, weight in enumerate(weights) if weight > 0 and shares[i] > least]
        shares[max(open_to, key=lambda i: (step * (ideal[i] - shares[i]), -i))] += step
    return shares


class Interleaving:
    """Merges ``counts[d]`` rows of each domain d into one evenly spread, repeating order.

    Row k of n of a domain wants to stand at (k + 1/2) / n of the period; rows stand in the order of their wishes.
    Any prefix of m rows then holds m·n/period rows of each domain to within a row or two.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        domain = np.repeat(np.arange(len(counts)), np.array(counts, np.int64))
        wish = np.concatenate([np.empty(0), *((np.arange(n) + 0.5) / max(n, 1) for n in counts)])
        order = np.lexsort((domain, wish))
        self._counts = np.array(counts, np.int64)
        self._domain: NDArray[np.int64] = domain[order]
        self._before = np.empty(len(domain), np.int64)  # rows of the same domain earlier in the period
        for d, n in enumerate(counts):
            self._before[self._domain == d] = np.arange(n)

    def __len__(self) -> int:
        """Rows of one period."""
        return len(self._domain)

    def locate(self, row_id: int) -> tuple[int, int]:
        """(domain, row of that domain) of row ``row_id`` of the endless repetition."""
        period, at = divmod(row_id, len(self))
        domain = int(self._domain[at])
        return domain, int(period * self._counts[domain] + self._before[at])
