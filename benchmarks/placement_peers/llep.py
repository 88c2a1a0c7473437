"""LLEP, least-loaded expert parallelism (2026): with true loads, what exceeds a rank's capacity spills to others.

Experts go by load, heaviest first. An owner keeps what fits under its capacity (the mean times a factor); the rest is
cut into chunks for the least loaded groups, each as large as fits, whose weights travel along. A chunk below a least
size stays where it is. Splits are of the whole batch: every source's pairs are divided in the same proportions.
"""

import numpy as np
from placement_corpus import Corpus, Ints
from placement_outcome import SeatPlan

CAPACITY = 1.1  # of the mean
LEAST_CHUNK = 0.02  # of the mean


def plan_llep(corpus: Corpus, count_SE: Ints) -> SeatPlan:
    load_E, owner_E = count_SE.sum(0), corpus.owners()
    mean = load_E.sum() / corpus.num_groups
    capacity, least = CAPACITY * mean, LEAST_CHUNK * mean
    assigned_G = np.zeros(corpus.num_groups)
    pending_G = np.bincount(owner_E, load_E, corpus.num_groups)  # of experts that have not had their turn
    free_G = np.full(corpus.num_groups, corpus.slots)
    parts: list[dict[int, float]] = [{} for _ in load_E]
    for expert in np.argsort(-load_E, kind="stable").tolist():
        owner, left = int(owner_E[expert]), float(load_E[expert])
        pending_G[owner] -= left
        kept = min(left, max(0.0, capacity - assigned_G[owner]))
        parts[expert][owner] = kept
        assigned_G[owner] += kept
        left -= kept
        while left > least:
            busy_G = np.where(free_G > 0, assigned_G + pending_G, np.inf)
            busy_G[list(parts[expert])] = np.inf
            taker = int(np.argmin(busy_G))
            chunk = min(left, capacity - busy_G[taker])
            if chunk < least:
                break
            parts[expert][taker] = chunk
            assigned_G[taker] += chunk
            free_G[taker] -= 1
            left -= chunk
        parts[expert][owner] += left
        assigned_G[owner] += left
    offset_E1 = np.cumsum([0, *map(len, parts)])
    holder_Z = np.concatenate([sorted(part) for part in parts]).astype(np.int64)
    share_Z = np.concatenate([[part[holder] for holder in sorted(part)] for part in parts])
    share_Z = np.maximum(1, np.rint(share_Z / max(1.0, load_E.max()) * (1 << 20))).astype(np.int64)
    return SeatPlan(offset_E1, holder_Z, np.tile(share_Z, (corpus.num_groups, 1)))
