"""When each item of a plan runs, and a picture of it. Shapes: R ranks."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from moetrain.sequence.plan import Item, SequencePlan

MOST_LINES = 32  # ranks that are drawn
COLUMNS = 96
COLOURS = ("#9cc4e0", "#f2c38f", "#a8d5a2", "#e4a6a1", "#c5b3de", "#d9c9a3", "#f3b8d6", "#b9c0c4")


@dataclass(frozen=True, slots=True)
class Timeline:
    """When rounds begin: ranks whose blocks a gang joins, directly or by others, begin each together.

    Args:
        plan: with times of its items.
        items: all of it.
        set_R: int64, of each rank the set that it waits for.
        begin: of each set, when its rounds begin, and when the last one ends.
    """

    plan: SequencePlan
    items: tuple[Item, ...]
    set_R: NDArray[np.int64]
    begin: dict[int, list[float]]

    @classmethod
    def of(cls, plan: SequencePlan, *, equal_rounds: bool = False) -> "Timeline":
        """The timeline of a plan; with ``equal_rounds`` all ranks wait for one another in each round."""
        items = plan.all_items()
        leader = list(range(plan.num_ranks // plan.block))

        def find(block: int) -> int:
            while leader[block] != block:
                leader[block] = leader[leader[block]]
                block = leader[block]
            return block

        pairs = [(item.ranks[0] // plan.block, rank // plan.block) for item in items for rank in item.ranks[1:]]
        pairs += [(0, block) for block in range(1, len(leader))] if equal_rounds else []
        for one, other in pairs:
            first, second = sorted((find(one), find(other)))
            leader[second] = first
        set_R = np.array([find(rank // plan.block) for rank in range(plan.num_ranks)], np.int64)
        longest: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for item in items:
            of_set = longest[int(set_R[item.ranks[0]])]
            of_set[item.round] = max(of_set[item.round], item.est_ms)
        begin = {}
        for of in set(set_R.tolist()):
            lengths = [longest[of][idx] for idx in range(plan.num_rounds(of * plan.block))]
            begin[of] = np.concatenate([[0.0], np.cumsum(lengths)]).tolist()
        return cls(plan, items, set_R, begin)

    @property
    def end_ms(self) -> float:
        """When the last rank is done."""
        return max((begin[-1] for begin in self.begin.values()), default=0.0)

    def begin_of(self, item: Item) -> float:
        """When an item begins."""
        return self.begin[int(self.set_R[item.ranks[0]])][item.round]

    def busy_share(self) -> float:
        """Share of all ranks' time up to the end in which they compute."""
        busy = sum(item.est_ms * len(item.ranks) for item in self.items)
        return busy / (self.plan.num_ranks * self.end_ms) if self.end_ms else 0.0

    def draw(self) -> list[Text]:
        """A line per rank, or of many ranks some; one letter for an item, capital for a gang, a dot where it waits."""
        num_ranks = self.plan.num_ranks
        shown = np.unique(np.linspace(0, num_ranks - 1, min(num_ranks, MOST_LINES)).round().astype(int)).tolist()
        letter = {item.gid: self._letter(index, item) for index, item in enumerate(self.items)}
        of_rank: dict[int, list[Item]] = defaultdict(list)
        for item in self.items:
            for rank in set(item.ranks) & set(shown):
                of_rank[rank].append(item)
        wide = len(str(num_ranks - 1))
        return [self._line(rank, of_rank[rank], letter, wide) for rank in shown]

    def _line(self, rank: int, items: Sequence[Item], letter: dict[int, str], wide: int) -> Text:
        line = Text(f"  rank {rank:>{wide}} ")
        cells: list[tuple[str, str]] = [("·", "dim")] * COLUMNS
        per_ms = COLUMNS / self.end_ms if self.end_ms else 0.0
        for item in items:
            first = int(self.begin_of(item) * per_ms)
            last = max(first + 1, round((self.begin_of(item) + item.est_ms) * per_ms))
            colour = f"black on {COLOURS[item.gid % len(COLOURS)]}"
            for column in range(first, min(last, COLUMNS)):
                cells[column] = (letter[item.gid], colour)
        for text, style in cells:
            line.append(text, style)
        return line

    @staticmethod
    def _letter(index: int, item: Item) -> str:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if len(item.ranks) > 1 else "abcdefghijklmnopqrstuvwxyz"
        return letters[index % len(letters)]
