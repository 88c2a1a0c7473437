"""Owned rows move to other owners: masters, moments, whatever is kept for each expert.

Shapes: C owned rows, L elements of each.
"""

import torch
from torch import Tensor

from moetrain.config.errors import require
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives


def move_rows(collectives: SparseCollectives, before: Placement, after: Placement, rows_CL: Tensor) -> Tensor:
    """The rows that this rank owns after a move, of those that ranks owned before it. A collective of the pool.

    Bits move as they are, each row once, and only where its owner changes.

    Args:
        collectives: of the pool.
        before: whose owners have the rows now.
        after: whose owners get them.
        rows_CL: this rank's rows, by expert.

    Raises:
        ValueError: experts are cut into slices, which have owners of their own, or the placements do not fit together.
    """
    sizes = [(one.num_experts, one.num_groups, one.num_shards) for one in (before, after)]
    require(
        sizes[0] == sizes[1] and before.num_slices == after.num_slices == 1,
        f"move_rows: both placements must be of the same pool, without slices, got experts, groups and shards {sizes} "
        f"and {before.num_slices} and {after.num_slices} slices",
    )
    # To move is to gather with the new owner as the only holder.
    one_each = torch.arange(after.num_experts + 1, dtype=torch.int32)
    owner_E = after.owner_ES.flatten()
    route = Placement(
        before.num_groups, before.owner_ES, one_each, owner_E, torch.ones_like(owner_E), num_shards=before.num_shards
    )
    plan = collectives.plan(route)
    moved_CL = rows_CL.new_empty(plan.num_held, rows_CL.shape[1])
    collectives.all_gather(plan, rows_CL.contiguous(), moved_CL, purpose="move")
    return moved_CL
