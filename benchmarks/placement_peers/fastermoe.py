"""FasterMoE's dynamic shadowing (PPoPP 2022): the hottest experts are copied to everybody while that lowers the load.

A shadowed expert is computed where its tokens are. Experts go by load, and each is shadowed if the highest load falls.
"""

import numpy as np
from placement_corpus import Corpus, Ints
from placement_outcome import SeatPlan


def plan_fastermoe(corpus: Corpus, count_SE: Ints) -> SeatPlan:
    owner_E, load_E = corpus.owners(), count_SE.sum(0)
    load_G = np.bincount(owner_E, load_E, corpus.num_groups)
    shadows: list[int] = []
    for expert in np.argsort(-load_E, kind="stable").tolist():
        if len(shadows) == corpus.slots:
            break
        shadowed_G = load_G + count_SE[:, expert]
        shadowed_G[owner_E[expert]] -= load_E[expert]
        if shadowed_G.max() < load_G.max():
            shadows.append(expert)
            load_G = shadowed_G
    everybody = list(range(corpus.num_groups))
    plan = SeatPlan.even(
        [everybody if expert in shadows else [int(owner_E[expert])] for expert in range(corpus.num_experts)],
        corpus.num_groups,
    )
    is_shadow_Z = np.isin(plan.expert_Z, shadows)
    is_home_SZ = plan.holder_Z == np.arange(corpus.num_groups)[:, None]
    return SeatPlan(plan.offset_E1, plan.holder_Z, (is_home_SZ | ~is_shadow_Z).astype(np.int64))
