"""What the tests of dispatch share."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from moe.helpers import expert_weights
from torch import Tensor

from moetrain.moe import ExpertRows, LocalDispatcher, Routing, Sent, run_experts
from moetrain.moe.dispatch_plan import DispatchPlan
from moetrain.placement.placement import Placement
from moetrain.placement.store import ExpertWeights


def slice_of(rank: int, sizes: list[int]) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def in_one_place(params: dict[str, Tensor], x_TD: Tensor, routing: Routing) -> tuple[ExpertWeights, Tensor]:
    """All experts' weights, and what they make of all tokens."""
    everything = expert_weights(params)
    sent = LocalDispatcher(routing.num_experts).send(x_TD, routing, torch.zeros(1, dtype=torch.int32))
    return everything, sent.through(experts(everything))


def experts(weights: ExpertWeights) -> Callable[[ExpertRows], Tensor]:
    def run(rows: ExpertRows) -> Tensor:
        return run_experts(rows.x_RD, rows.row_N, rows.weight_N, rows.offset_e1, weights, "relu2")

    return run


def plan_of(sent: Sent) -> DispatchPlan:
    """The plan of a micro-batch in one piece."""
    (piece,) = sent.pieces
    return piece.travel.plan  # type: ignore[attr-defined]


def scattered_placement(num_experts: int, seed: int) -> Placement:
    """Each expert on a random rank: ranks without experts and experts out of order are ordinary."""
    world = dist.get_world_size()
    homes = torch.randint(world, (num_experts,), generator=torch.Generator().manual_seed(seed)).tolist()
    alone = tuple((home,) for home in homes)
    return Placement(world, alone, alone, (((1,),) * num_experts,) * world)


def by_expert(weights: ExpertWeights, name: str) -> Tensor:
    return getattr(weights, name).grad[weights.slot_E.long()]
