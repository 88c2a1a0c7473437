"""Plans where the experts of all layers live, in one call on one thread of the CPU, without Python's lock.

Shapes: L layers, E experts, G groups (the ranks that hold the shards of one expert), N nodes of G / N neighbouring
groups, Z seats of a layer at most. A seat is (expert, holder), ascending. The tokens of group s for expert e are split
among e's seats by shares: weight * (home if s is the holder, else near if both are on one node, else far). Where all
these are 0 the weights alone count.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.cost.step_costs import UNMEASURED, StepCosts
from moetrain.ops.native import OPS


@dataclass(frozen=True, slots=True, eq=False)
class PlannedSeats:
    """The seats of all layers. All int32 on the CPU."""

    offset_LE1: Tensor  # where each expert's seats begin
    holder_LZ: Tensor  # groups; behind a layer's last seat 0, and so are the weights
    weight_LZ: Tensor
    affinity_L3: Tensor  # home, near, far; shares of one source and expert sum to 2^24 at most


def plan_placements(
    count_LNE: Tensor,
    owner_LE: Tensor,
    *,
    num_groups: int,
    groups_per_node: int,
    planner: str,
    slots: int,
    costs: StepCosts = UNMEASURED,
    seed: int = 0,
) -> tuple[PlannedSeats, Tensor]:
    """Decide who holds what. Nothing has a gradient; equal inputs give equal plans on all machines.

    Args:
        count_LNE: float32, pairs that each node's tokens are expected to make for each expert.
        owner_LE: int32, the group that owns each expert; it always has a seat.
        num_groups: G.
        groups_per_node: G / N.
        planner: ``static`` (owners alone), ``full`` (everybody holds all and serves itself), ``random`` (for tests),
            ``hecate`` (arXiv 2502.02581, algorithm 1, with ``costs.overlap_degree`` as its t; even shares) or
            ``moetrain`` (levels loads and keeps rows near, by ``costs``).
        slots: replicas that a group may hold beside what it owns; ``full`` takes what it needs.
        costs: what to weigh against what.
        seed: of ``random``.

    Returns:
        The seats, and ``measure_L4`` float64: of each layer's worst group the pairs, the rows in or out inside its
        node, those between nodes, and its replicas.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit, counts that are negative or not finite, owners that are no groups, slots
            beyond the experts, an unknown planner.
    """
    *seats, measure_L4 = OPS.plan_placements(
        count_LNE,
        owner_LE,
        num_groups,
        groups_per_node,
        planner,
        slots,
        costs.overlap_degree,
        seed,
        costs.pair_s,
        costs.near_row_s,
        costs.far_row_s,
        costs.expert_s,
        costs.overlap_s,
    )
    return PlannedSeats(*seats), measure_L4


def measure_placements(
    count_LNE: Tensor, owner_LE: Tensor, seats: PlannedSeats, *, num_groups: int, groups_per_node: int
) -> Tensor:
    """What seats make of other counts than they were planned for; the same ``measure_L4``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit, counts that are negative or not finite, or seats out of order.
    """
    lists = (seats.offset_LE1, seats.holder_LZ, seats.weight_LZ, seats.affinity_L3)
    return OPS.measure_placements(count_LNE, owner_LE, num_groups, groups_per_node, *lists)


def split_placements(
    count_LNE: Tensor,
    owner_LE: Tensor,
    seats: PlannedSeats,
    *,
    num_groups: int,
    groups_per_node: int,
    costs: StepCosts = UNMEASURED,
) -> tuple[PlannedSeats, Tensor]:
    """Split tokens anew among the holders that there are, as ``moetrain`` would: no weights move.

    Args:
        count_LNE: as in ``plan_placements``, and so are ``owner_LE``, ``num_groups``, ``groups_per_node``, ``costs``.
        owner_LE: see there.
        seats: whose holders stay.
        num_groups: see there.
        groups_per_node: see there.
        costs: see there.

    Returns:
        Seats with new weights and affinities, and their ``measure_L4``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit, counts that are negative or not finite, or seats out of order.
    """
    weight_LZ, affinity_L3, measure_L4 = OPS.split_placements(
        count_LNE,
        owner_LE,
        num_groups,
        groups_per_node,
        seats.offset_LE1,
        seats.holder_LZ,
        seats.weight_LZ,
        seats.affinity_L3,
        costs.pair_s,
        costs.near_row_s,
        costs.far_row_s,
        costs.expert_s,
        costs.overlap_s,
    )
    return PlannedSeats(seats.offset_LE1, seats.holder_LZ, weight_LZ, affinity_L3), measure_L4


def reshard_owners(
    count_LNE: Tensor, owner_LE: Tensor, *, num_groups: int, groups_per_node: int, num_hot: int
) -> Tensor:
    """Who should own what, over all layers together (arXiv 2502.02581, algorithm 2).

    A group owns at most E L / G experts, rounded up, and any number of one layer. Experts that are not hot are spread
    by load, node first; the hot ones, whose load their replicas take, fill what room is left. Where it costs little an
    expert stays with its owner.

    Args:
        count_LNE: as in ``plan_placements``, and so are ``owner_LE``, ``num_groups`` and ``groups_per_node``.
        owner_LE: see there.
        num_groups: see there.
        groups_per_node: see there.
        num_hot: how many of each layer's experts are hot.

    Returns:
        The new ``owner_LE``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit, counts that are negative or not finite, or more hot experts than there are.
    """
    return OPS.reshard_owners(count_LNE, owner_LE, num_groups, groups_per_node, num_hot)


@torch.library.register_fake("moetrain::plan_placements")
def _plan_placements_fake(
    count_LNE: Tensor,
    owner_LE: Tensor,
    num_groups: int,
    groups_per_node: int,
    planner: str,
    slots: int,
    *others: object,
) -> tuple[Tensor, ...]:
    num_layers, num_experts = owner_LE.shape
    replicas = {"static": 0, "full": num_experts * num_groups - num_experts}.get(planner, num_groups * slots)
    return (
        owner_LE.new_empty(num_layers, num_experts + 1),
        owner_LE.new_empty(num_layers, num_experts + replicas),
        owner_LE.new_empty(num_layers, num_experts + replicas),
        owner_LE.new_empty(num_layers, 3),
        owner_LE.new_empty(num_layers, 4, dtype=torch.float64),
    )


@torch.library.register_fake("moetrain::measure_placements")
def _measure_placements_fake(count_LNE: Tensor, *others: object) -> Tensor:
    return count_LNE.new_empty(count_LNE.shape[0], 4, dtype=torch.float64)


@torch.library.register_fake("moetrain::reshard_owners")
def _reshard_owners_fake(count_LNE: Tensor, owner_LE: Tensor, *others: object) -> Tensor:
    return torch.empty_like(owner_LE)


@torch.library.register_fake("moetrain::split_placements")
def _split_placements_fake(
    count_LNE: Tensor, owner_LE: Tensor, num_groups: int, groups_per_node: int, *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, weight_LZ, affinity_L3, *_ = others
    measure_L4 = count_LNE.new_empty(count_LNE.shape[0], 4, dtype=torch.float64)
    return torch.empty_like(weight_LZ), torch.empty_like(affinity_L3), measure_L4
