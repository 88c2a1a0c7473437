"""Other ways to deal sequences out to ranks, under the costs and rules of our planners. See bench_hdp.py.

Each gives a plan whose items keep to what ranks hold and to the round rule; ``Timeline`` says how long it takes.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from moetrain.config.sequence import largest_share
from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES as COSTS
from moetrain.sequence import Item, Sequence, SequencePlan
from moetrain.sequence.plan import Ints
from moetrain.sequence.timeline import Timeline

Members = list[int]  # rows of the table


def powers_of_two(table: Ints, num_ranks: int, block: int, capacity: int) -> SequencePlan:
    """Gangs of the least power of two that holds a sequence, aligned; the longest first to whoever is free first.

    Short ones are packed to capacity. Round numbers are put on the result.
    """
    packs = _packed(table, capacity, partial(_least_power, capacity))
    free, next_round = np.zeros(num_ranks), np.zeros(num_ranks, np.int64)
    items: list[Item] = []
    for members, d in packs:
        starts = free.reshape(-1, d).max(axis=1)
        first = int(starts.argmin()) * d
        ms = COSTS.of_item(table[members, 1].tolist(), d)
        ranks = slice(first, first + d)
        round_idx = int(next_round[ranks].max())
        free[ranks] = starts.min() + ms
        next_round[ranks] = round_idx + 1
        items.append(_item(table, round_idx, members, range(first, first + d), ms))
    return _plan(table, items, num_ranks, block, capacity)


def free_then_rounds(table: Ints, num_ranks: int, block: int, capacity: int, bound_ms: float) -> SequencePlan:
    """As many ranks as level the work of ranks that run freely, and round numbers put on the result.

    Sequences are mouldable: for a time T each gets the fewest ranks on which it is done in T; the longest item first to
    the ranks that are free first. Of several T the one whose ranks are done first if they run freely.
    """
    best, least = None, math.inf
    for over in (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 2.0):
        packs = _packed(table, capacity, partial(_within, bound_ms * over, num_ranks, capacity))
        timed = sorted(((COSTS.of_item(table[m, 1].tolist(), d), m, d) for m, d in packs), key=lambda x: -x[0])
        lanes = [(0.0, rank) for rank in range(num_ranks)]
        next_round, items, end = [0] * num_ranks, [], 0.0
        for ms, members, d in timed:
            taken = [heapq.heappop(lanes) for _ in range(d)]
            ready, ranks = taken[-1][0], sorted(rank for _, rank in taken)
            round_idx = max(next_round[rank] for rank in ranks)
            for rank in ranks:
                next_round[rank] = round_idx + 1
                heapq.heappush(lanes, (ready + ms, rank))
            end = max(end, ready + ms)
            items.append(_item(table, round_idx, members, ranks, ms))
        if end < least:
            best, least = items, end
    assert best is not None
    return _plan(table, best, num_ranks, block, capacity)


def flexsp_like(table: Ints, num_ranks: int, block: int, capacity: int) -> SequencePlan:
    """After FlexSP (arXiv 2412.01523): micro-batches of neighbours in length, each with groups of powers of two.

    In a micro-batch the longest of its groups counts; its sequences are dealt out by first fit for a time that is
    bisected, where FlexSP solves a mixed-integer programme. Of the fewest micro-batches and some more the best.
    """
    order = np.argsort(-table[:, 1], kind="stable")
    ends = np.cumsum(table[order, 1])
    fewest = -(-int(ends[-1]) // (num_ranks * capacity))
    best: list[Item] | None = None
    least = math.inf
    for count in range(fewest, fewest + 5):
        cuts = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, count) / count).tolist(), len(order)]
        items, total = [], 0.0
        for idx in range(count):
            found = _groups(table, order[cuts[idx] : cuts[idx + 1]].tolist(), num_ranks, capacity)
            if found is None:
                break
            lane = 0
            for members, d in found:
                ms = COSTS.of_item(table[members, 1].tolist(), d)
                items.append(_item(table, idx, members, range(lane, lane + d), ms))
                lane += d
            total += max((item.est_ms for item in items if item.round == idx), default=0.0)
        else:
            if total < least:
                best, least = items, total
    assert best is not None
    return _plan(table, best, num_ranks, block, capacity)


def _groups(table: Ints, rows: Members, num_ranks: int, capacity: int) -> list[tuple[Members, int]] | None:
    """Groups of the least time; None where they do not fit side by side."""
    if not rows:
        return []
    high = sum(COSTS.ms(int(table[row, 1]), _least_power(capacity, int(table[row, 1]))) for row in rows)
    low, best = 0.0, _side_by_side(table, rows, num_ranks, capacity, high)
    for _ in range(18):
        middle = (low + high) / 2
        found = _side_by_side(table, rows, num_ranks, capacity, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _side_by_side(
    table: Ints, rows: Members, num_ranks: int, capacity: int, limit_ms: float
) -> list[tuple[Members, int]] | None:
    """First fit, the longest first, into groups that are done within ``limit_ms``."""
    groups: list[tuple[Members, int]] = []
    open_of: dict[int, list[list[float]]] = {}  # by ranks: [group, tokens, ms] of those that may have room
    lanes = 0
    for row in rows:
        n = int(table[row, 1])
        d = _least_power(capacity, n)
        while d <= num_ranks and COSTS.ms(n, d) > limit_ms:
            d *= 2
        if d > num_ranks:
            return None
        ms = COSTS.ms(n, d) - COSTS.ms(0)
        for room in open_of.setdefault(d, [])[-8:]:
            if room[1] + n <= capacity * d - 2 * d and room[2] + ms <= limit_ms:
                groups[int(room[0])][0].append(row)
                room[1] += n
                room[2] += ms
                break
        else:
            lanes += d
            if lanes > num_ranks:
                return None
            open_of[d].append([len(groups), n, ms + COSTS.ms(0)])
            groups.append(([row], d))
    return groups


def _packed(table: Ints, capacity: int, ranks_of: Callable[[int], int]) -> list[tuple[Members, int]]:
    """Items with their ranks, the longest sequence first; those of one rank are packed to capacity in this order."""
    packs: list[tuple[Members, int]] = []
    room = 0
    for row in np.argsort(-table[:, 1], kind="stable").tolist():
        n = int(table[row, 1])
        d = ranks_of(n)
        if d > 1 or n > room:
            packs.append(([row], d))
            room = capacity - n if d == 1 else 0
        else:
            packs[-1][0].append(row)
            room -= n
    return packs


def _least_power(capacity: int, n: int) -> int:
    d = 1 << max(0, (-(-n // capacity) - 1).bit_length())
    return d if largest_share(n, d) <= capacity else 2 * d


def _within(limit_ms: float, num_ranks: int, capacity: int, n: int) -> int:
    """The fewest ranks on which a sequence is done in time, or the number that makes it fastest."""
    least = 1 if n <= capacity else -(-n // capacity)
    while largest_share(n, least) > capacity:
        least += 1
    d = least
    while d < num_ranks and COSTS.ms(n, d) > limit_ms and COSTS.ms(n, d + 1) < COSTS.ms(n, d):
        d += 1
    return d


def _item(table: Ints, round_idx: int, members: Members, ranks: Iterable[int], ms: float) -> Item:
    return Item(0, round_idx, tuple(table[members, 0].tolist()), tuple(ranks), 0.0, ms)


def _plan(table: Ints, items: list[Item], num_ranks: int, block: int, capacity: int) -> SequencePlan:
    items = sorted(items, key=lambda item: item.round)
    rounds = [1 + max(item.round for item in items)] * num_ranks
    plan = SequencePlan.of_items(
        [Sequence(*row) for row in table.tolist()],
        items,
        num_ranks=num_ranks,
        block=block,
        capacity=capacity,
        rounds=rounds,
    )
    return replace(plan, est_makespan_ms=Timeline.of(plan).end_ms)
