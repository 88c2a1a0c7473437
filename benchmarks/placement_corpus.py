"""Loads to plan for: a fixed synthetic corpus of tokens' choices, and recorded traces of counts.

Shapes: S sources (groups of ranks), T tokens of each, K experts per token, E experts, N nodes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.placement.trace import Trace

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens draw K distinct experts by their popularity: Zipf's law, whose logarithm walks at random."""

    num_groups: int = 32
    groups_per_node: int = 8
    num_experts: int = 64
    top_k: int = 8
    num_tokens: int = 512
    zipf: float = 0.8
    drift: float = 0.1
    slots: int = 2

    @property
    def num_nodes(self) -> int:
        return self.num_groups // self.groups_per_node

    def owners(self) -> Ints:
        """As expert parallelism spreads them."""
        return np.arange(self.num_experts) * self.num_groups // self.num_experts

    def steps(self, seed: int, *, shift_at: int | None = None) -> Iterator[Ints]:
        """Choices [S, T, K], step by step; at ``shift_at`` all popularities change their experts."""
        random = np.random.default_rng(seed)
        log_E = np.log(np.arange(1, self.num_experts + 1) ** -self.zipf)[random.permutation(self.num_experts)]
        step = 0
        while True:
            if step == shift_at:
                log_E = log_E[random.permutation(self.num_experts)]
            noise = random.gumbel(size=(self.num_groups, self.num_tokens, self.num_experts))
            yield np.argpartition(-(log_E + noise), self.top_k - 1, axis=2)[:, :, : self.top_k].astype(np.int64)
            log_E = log_E + self.drift * random.normal(size=self.num_experts)
            step += 1

    def count(self, choice_STK: Ints) -> Ints:
        """[S, E]: pairs of each source."""
        return np.stack([np.bincount(one.ravel(), minlength=self.num_experts) for one in choice_STK])


def by_node(count_SE: Ints, groups_per_node: int) -> NDArray[np.float32]:
    """[N, E]"""
    return count_SE.reshape(-1, groups_per_node, count_SE.shape[-1]).sum(1).astype(np.float32)


def read_trace(path: Path) -> Ints:
    """``count`` [step, layer, source, expert] of a recorded run: one file, the folder of its pieces, or the run's.

    Raises:
        ValueError: it is no trace, has gaps or negative counts, or fewer than 3 steps.
    """
    count = Trace.load(path).count
    if len(count) < 3:
        raise ValueError(f"{path}: a trace must have at least 3 steps, got {len(count)}; train for longer")
    return count.astype(np.int64)
