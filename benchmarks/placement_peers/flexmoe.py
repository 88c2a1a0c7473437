"""FlexMoE's virtual experts (SIGMOD 2023): step by step the hottest is expanded and the coldest shrunk.

A virtual expert is a replica. While the highest load falls, the expert whose replicas carry most gets one more, in the
lightest group with a free slot; where no slot is free, the replica that carries least gives up its own. Tokens are
spread evenly.
"""

import numpy as np
from placement_corpus import Corpus, Ints
from placement_outcome import SeatPlan


def plan_flexmoe(corpus: Corpus, count_SE: Ints) -> SeatPlan:
    load_E, owner_E = count_SE.sum(0).astype(float), corpus.owners()
    holders = [[int(owner)] for owner in owner_E]
    worst = _loads(corpus, load_E, holders).max()
    for _ in range(2 * corpus.num_groups * corpus.slots):
        changed = _expand(corpus, load_E, [list(each) for each in holders])
        if changed is None or _loads(corpus, load_E, changed).max() > worst:
            break
        holders, worst = changed, _loads(corpus, load_E, changed).max()
    return SeatPlan.even(holders, corpus.num_groups)


def _expand(corpus: Corpus, load_E: np.ndarray, holders: list[list[int]]) -> list[list[int]] | None:
    each_E = load_E / np.array([len(each) for each in holders])
    hottest = int(each_E.argmax())
    free_G = _free(corpus, holders)
    if not free_G.any() and not _shrink(corpus, load_E, holders, hottest):
        return None
    free_G = _free(corpus, holders)
    free_G[holders[hottest]] = 0
    if not free_G.any():
        return None
    load_G = _loads(corpus, load_E, holders)
    holders[hottest].append(int(np.where(free_G > 0, load_G, np.inf).argmin()))
    return holders


def _shrink(corpus: Corpus, load_E: np.ndarray, holders: list[list[int]], kept: int) -> bool:
    replicated = [expert for expert, each in enumerate(holders) if len(each) > 1 and expert != kept]
    if not replicated:
        return False
    holders[min(replicated, key=lambda expert: load_E[expert] / (len(holders[expert]) - 1))].pop()
    return True


def _free(corpus: Corpus, holders: list[list[int]]) -> Ints:
    used = [group for each in holders for group in each[1:]]  # the first is the owner
    return corpus.slots - np.bincount(used, minlength=corpus.num_groups)


def _loads(corpus: Corpus, load_E: np.ndarray, holders: list[list[int]]) -> np.ndarray:
    load_G = np.zeros(corpus.num_groups)
    for load, each in zip(load_E, holders, strict=True):
        load_G[each] += load / len(each)
    return load_G
