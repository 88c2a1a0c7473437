"""Moves owners, but only those moves that pay: Hecate's algorithm 2 behind a guard."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config.errors import require_at_least
from moetrain.ops.plan_placements import plan_placements, reshard_owners
from moetrain.placement.planner.plan import PlannerSetup, require_counts


@dataclass(frozen=True, slots=True, eq=False)
class OwnerMoves:
    """Who owns what from now on; modelled seconds of the whole interval.

    Attributes:
        owner_LE: int32, groups.
        num_moves: experts, over all layers, whose owner changes.
        gain_s: what the layers that move save until owners may move again.
        cost_s: what moving masters and moments takes, less than ``gain_s`` where anything moves.
    """

    owner_LE: Tensor
    num_moves: int
    gain_s: float
    cost_s: float


def move_owners(
    setup: PlannerSetup, count_LNE: Tensor, owner_LE: Tensor, *, interval_steps: int, state_bytes: float
) -> OwnerMoves:
    """Reshard the layers in which that saves more than it costs, by plans under both maps of owners.

    Where the layers that would lose cannot stay behind for lack of room, all are weighed together.

    Args:
        setup: for which cluster, by which planner.
        count_LNE: float32, the loads that the interval is expected to have.
        owner_LE: int32, today's owners.
        interval_steps: steps until owners may move again.
        state_bytes: master and moments of one expert.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit the setup, counts that are negative or not finite, an interval below 1.
    """
    require_at_least("placement.move_owners_every", interval_steps, 1)
    require_counts(setup, count_LNE)
    sizes = {"num_groups": setup.num_groups, "groups_per_node": setup.groups_per_node}
    num_hot = min(setup.num_experts, setup.slots, setup.costs.overlap_degree)
    new_LE = reshard_owners(count_LNE, owner_LE, **sizes, num_hot=num_hot)
    before_L, after_L = (_layer_seconds(setup, count_LNE, owners) for owners in (owner_LE, new_LE))
    gain_L = (before_L - after_L) * interval_steps
    cost_L = (new_LE != owner_LE).sum(1).double() * state_bytes * setup.costs.weight_byte_s
    moves_L = layers_that_pay(gain_L - cost_L, owner_LE, new_LE, setup.num_groups)
    chosen_LE = torch.where(moves_L.unsqueeze(1), new_LE, owner_LE)
    return OwnerMoves(
        chosen_LE,
        int((chosen_LE != owner_LE).sum()),
        float(gain_L[moves_L].sum()),
        float(cost_L[moves_L].sum()),
    )


def _layer_seconds(setup: PlannerSetup, count_LNE: Tensor, owner_LE: Tensor) -> Tensor:
    sizes = {"num_groups": setup.num_groups, "groups_per_node": setup.groups_per_node}
    _, measure_L4 = plan_placements(
        count_LNE,
        owner_LE,
        **sizes,
        planner=setup.planner,
        slots=setup.slots,
        costs=setup.costs,
        seed=setup.seed,
    )
    return torch.tensor(setup.costs.layers_s(measure_L4), dtype=torch.float64)


def layers_that_pay(net_L: Tensor, owner_LE: Tensor, new_LE: Tensor, num_groups: int) -> Tensor:
    """Which layers move: all, less the losing ones, the worst first, that leave every group within its room."""
    room = max(-(-new_LE.numel() // num_groups), int(_owned(owner_LE, num_groups).max()))
    moves_L = torch.ones(len(net_L), dtype=torch.bool)
    for layer in net_L.argsort(stable=True).tolist():
        if net_L[layer] > 0:
            break
        moves_L[layer] = False
        kept_LE = torch.where(moves_L.unsqueeze(1), new_LE, owner_LE)
        moves_L[layer] = bool((_owned(kept_LE, num_groups) > room).any())
    return moves_L if float(net_L[moves_L].sum()) > 0 else torch.zeros_like(moves_L)


def _owned(owner_LE: Tensor, num_groups: int) -> Tensor:
    return torch.bincount(owner_LE.flatten(), minlength=num_groups)
