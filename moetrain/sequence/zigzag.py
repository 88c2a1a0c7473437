"""How a gang of ranks shares sequences: each rank has an early and a late part of every one.

A sequence of n tokens is cut in 2d parts at floor(p n / 2d); of d ranks, rank r has the parts r and 2d - 1 - r. Under
causal attention all ranks then have the same work, whatever d and n are; parts may be empty, and no token is padding.
Whatever rank s holds is seen by rank r as one square or one rectangle:

    s = r  its tokens, early and late, see each other causally: a square
    s < r  all tokens of r see the early part of s, none the late one
    s > r  the late part of r sees both parts of s, its early part none
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moetrain.config.errors import require, require_at_least


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one rank's queries see of the keys that another one holds, as ``moetrain.ops.attend`` takes it."""

    range_q_S2: Tensor
    range_k_S2: Tensor
    causal: bool


class Zigzag:
    """The parts of some sequences on the ranks of a gang. A rank has them sequence by sequence, the early one first."""

    def __init__(self, num_tokens: Sequence[int], num_ranks: int) -> None:
        """Cut.

        Args:
            num_tokens: of each sequence, all of which the gang shares.
            num_ranks: d.

        Raises:
            ValueError: there is no rank, or a length is negative.
        """
        require_at_least("Zigzag: num_ranks", num_ranks, 1)
        require(min(num_tokens, default=0) >= 0, f"Zigzag: lengths must be at least 0, got {list(num_tokens)}")
        self.num_tokens = tuple(num_tokens)
        self.num_ranks = num_ranks

    def parts(self, sequence: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Begin and end in the sequence of the early and of the late part.

        >>> Zigzag([10], 2).parts(0, 0), Zigzag([10], 2).parts(0, 1)
        (((0, 2), (7, 10)), ((2, 5), (5, 7)))
        """
        return self._part(sequence, rank), self._part(sequence, 2 * self.num_ranks - 1 - rank)

    def size(self, rank: int) -> int:
        """Tokens of all sequences on ``rank``."""
        return sum(end - begin for i in range(len(self.num_tokens)) for begin, end in self.parts(i, rank))

    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        """Number of the sequence, begin and end in it, of each part that the rank has, in order; empty ones left out.

        >>> Zigzag([10, 1], 2).pieces(0), Zigzag([10, 1], 2).pieces(1)
        ([(0, 0, 2), (0, 7, 10), (1, 0, 1)], [(0, 2, 5), (0, 5, 7)])
        """
        parts = [(i, *part) for i in range(len(self.num_tokens)) for part in self.parts(i, rank)]
        return [(i, begin, end) for i, begin, end in parts if begin < end]

    def seen(self, rank: int, source: int) -> Seen:
        """What the queries of ``rank`` see of the keys of ``source``: one segment per sequence."""
        if source == rank:
            whole = [(begin, end) for begin, _, end in self._local(rank)]
            return Seen(_ranges(whole), _ranges(whole), causal=True)
        mine, theirs = self._local(rank), self._local(source)
        if source < rank:
            queries, keys = [(begin, end) for begin, _, end in mine], [(begin, middle) for begin, middle, _ in theirs]
        else:
            queries, keys = [(middle, end) for _, middle, end in mine], [(begin, end) for begin, _, end in theirs]
        return Seen(_ranges(queries), _ranges(keys), causal=False)

    def _part(self, sequence: int, part: int) -> tuple[int, int]:
        n, cuts = self.num_tokens[sequence], 2 * self.num_ranks
        return part * n // cuts, (part + 1) * n // cuts

    def _local(self, rank: int) -> list[tuple[int, int, int]]:
        """Where each sequence begins among the rank's tokens, its late part begins, and it ends."""
        sizes = [[end - begin for begin, end in self.parts(i, rank)] for i in range(len(self.num_tokens))]
        begins = [0]
        for early, late in sizes:
            begins.append(begins[-1] + early + late)
        return [(begin, begin + early, end) for (begin, end), (early, _) in zip(pairwise(begins), sizes, strict=True)]


def _ranges(of: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(of, dtype=torch.int32).view(-1, 2)
