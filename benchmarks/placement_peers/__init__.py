"""Other planners, written anew from what their papers and projects say of them, in numpy.

All plan one layer: from [S, E] counts of sources to a ``SeatPlan``, with as many replicas per group as ours have slots
(FasterMoE's shadows included). None of their code is used; what they do beside planning is left out.
"""

from collections.abc import Callable, Mapping

from placement_corpus import Corpus, Ints
from placement_outcome import SeatPlan

from placement_peers.eplb import plan_eplb
from placement_peers.fastermoe import plan_fastermoe
from placement_peers.flexmoe import plan_flexmoe
from placement_peers.laer import plan_laer
from placement_peers.llep import plan_llep
from placement_peers.smartmoe import plan_smartmoe

Planner = Callable[[Corpus, Ints], SeatPlan]

PEERS: Mapping[str, Planner] = {
    "EPLB": plan_eplb,
    "LLEP": plan_llep,
    "LAER": plan_laer,
    "FasterMoE": plan_fastermoe,
    "SmartMoE": plan_smartmoe,
    "FlexMoE": plan_flexmoe,
}
