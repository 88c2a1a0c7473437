"""SmartMoE's dynamic placement (ATC 2023): no replicas; experts change places so that each group carries as much.

Heaviest first, each to the lightest group that has room for one more.
"""

from placement_corpus import Corpus, Ints
from placement_outcome import SeatPlan

from placement_peers.eplb import pack


def plan_smartmoe(corpus: Corpus, count_SE: Ints) -> SeatPlan:
    group_E = pack(count_SE.sum(0).astype(float), corpus.num_groups)
    return SeatPlan.even([[int(group)] for group in group_E], corpus.num_groups)
