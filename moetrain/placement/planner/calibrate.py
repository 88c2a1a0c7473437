"""Mends a layer's placement once its true loads are known, after the gate; what it gathers then nothing hides."""

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.ops.plan_placements import PlannedSeats, measure_placements, plan_placements, split_placements
from moetrain.placement.placement import Placement
from moetrain.placement.planner.plan import PlannerSetup, each_layer, require_counts


def calibrate(setup: PlannerSetup, count_NE: Tensor, current: Placement) -> Placement:
    """The fastest for these loads, as modelled: ``current``, its holders with tokens split anew, or a new plan.

    Splitting anew moves no weights, and is ``moetrain``'s whatever the planner. A new plan pays in full for every
    replica that is not held yet; it is taken only where the layer gets faster all the same.

    Args:
        setup: for which cluster, by which planner.
        count_NE: float32, the pairs of each source node.
        current: the placement whose weights are here; whole experts are its slices.

    Raises:
        TypeError: a wrong dtype.
        ValueError: counts that do not fit the setup, that are negative or not finite.
    """
    count_1NE, owner_1E = count_NE.unsqueeze(0), current.owner_ES[:, 0].contiguous().unsqueeze(0)
    require_counts(setup, count_1NE)
    sizes = {"num_groups": setup.num_groups, "groups_per_node": setup.groups_per_node}
    costs = replace(setup.costs, overlap_s=0.0)
    held = PlannedSeats(
        current.offset_E1.unsqueeze(0),
        current.holder_Z.unsqueeze(0),
        current.weight_Z.unsqueeze(0),
        torch.tensor([tuple(current.affinity)], dtype=torch.int32),
    )
    split, split_14 = split_placements(count_1NE, owner_1E, held, **sizes, costs=costs)
    fresh, fresh_14 = plan_placements(
        count_1NE, owner_1E, **sizes, planner=setup.planner, slots=setup.slots, costs=costs, seed=setup.seed
    )
    now_14 = measure_placements(count_1NE, owner_1E, held, **sizes)
    split_14[:, 3] = now_14[:, 3] = 0  # their weights are here
    (new,) = each_layer(setup, owner_1E, fresh)
    fresh_14[:, 3] = most_gathered(current, new)
    (now_s,), (split_s,), (fresh_s,) = (costs.layers_s(measure_14) for measure_14 in (now_14, split_14, fresh_14))
    if fresh_s < min(now_s, split_s):
        return new
    return current if now_s <= split_s else next(each_layer(setup, owner_1E, split))


def most_gathered(current: Placement, new: Placement) -> int:
    """Experts that the group which needs most of them does not hold yet."""
    held_Z, wanted_Z = (
        placement.expert_Z.long() * placement.num_groups + placement.holder_Z for placement in (current, new)
    )
    missing_Z = new.holder_Z[~torch.isin(wanted_Z, held_Z)]
    return int(torch.bincount(missing_Z, minlength=new.num_groups).max())
