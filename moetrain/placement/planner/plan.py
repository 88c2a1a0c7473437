"""From predicted loads to the seats of every layer."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moetrain.config.errors import require, require_at_least, require_divides, require_one_of
from moetrain.cost.step_costs import StepCosts
from moetrain.ops.plan_placements import PlannedSeats, measure_placements, plan_placements
from moetrain.placement.placement import Affinity, Placement

PLANNERS = ("static", "full", "random", "hecate", "moetrain")


@dataclass(frozen=True, slots=True)
class PlannerSetup:
    """What does not change from one plan to the next.

    Attributes:
        planner: one of ``PLANNERS``.
        num_experts: experts of a layer.
        num_groups: groups of ranks that hold the shards of one expert together.
        groups_per_node: consecutive groups that share a node.
        slots: replicas that a group may hold beside what it owns.
        costs: what to weigh against what.
        num_shards: ranks of a group.
        seed: of ``random``.

    Raises:
        ValueError: any of these is out of its range.
    """

    planner: str
    num_experts: int
    num_groups: int
    groups_per_node: int
    slots: int
    costs: StepCosts
    num_shards: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of("placement.planner", self.planner, PLANNERS)
        require_at_least("placement: experts of a layer", self.num_experts, 1)
        require_at_least("placement: groups of the expert pool", self.num_groups, 1)
        require_at_least("placement: groups of a node", self.groups_per_node, 1)
        require_divides("groups of a node", self.groups_per_node, "groups of the expert pool", self.num_groups)
        require_at_least("placement.slots", self.slots, 0, "set it to 0 to hold no replicas")
        require(
            self.slots <= self.num_experts,
            f"placement.slots ({self.slots}) must be at most the number of experts ({self.num_experts}), since a group "
            f"holds an expert once; set it to {self.num_experts} or less",
        )

    @property
    def num_nodes(self) -> int:
        """Nodes of the expert pool."""
        return self.num_groups // self.groups_per_node


def plan_layers(
    setup: PlannerSetup, count_LNE: Tensor, owner_LE: Tensor, *, step: int = 0
) -> tuple[list[Placement], list[float]]:
    """Plan every layer, in one call that holds no lock of Python.

    Args:
        setup: for which cluster, by which planner.
        count_LNE: float32, predicted pairs of each source node.
        owner_LE: int32, the group that owns each expert.
        step: draws another plan where ``random`` does, and counts for nothing else.

    Returns:
        The layers' placements, with whole experts as slices, and their modelled seconds.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit the setup, counts that are negative or not finite, owners that are no groups.
    """
    require_counts(setup, count_LNE)
    seats, measure_L4 = plan_placements(
        count_LNE,
        owner_LE,
        num_groups=setup.num_groups,
        groups_per_node=setup.groups_per_node,
        planner=setup.planner,
        slots=setup.slots,
        costs=setup.costs,
        seed=setup.seed + step,
    )
    return list(each_layer(setup, owner_LE, seats)), setup.costs.layers_s(measure_L4)


def modelled_seconds(setup: PlannerSetup, count_LNE: Tensor, owner_LE: Tensor, seats: PlannedSeats) -> list[float]:
    """What each layer would take with these seats and such counts; what calibration compares.

    Raises:
        TypeError: a wrong dtype.
        ValueError: sizes that do not fit, counts that are negative or not finite, seats out of order.
    """
    require_counts(setup, count_LNE)
    sizes = {"num_groups": setup.num_groups, "groups_per_node": setup.groups_per_node}
    return setup.costs.layers_s(measure_placements(count_LNE, owner_LE, seats, **sizes))


def require_counts(setup: PlannerSetup, count_LNE: Tensor) -> None:
    """Raise unless counts have the setup's nodes and experts."""
    expected = (setup.num_nodes, setup.num_experts)
    require(
        count_LNE.dim() == 3 and tuple(count_LNE.shape[1:]) == expected,
        f"counts must be [layers, nodes, experts] = [L, {expected[0]}, {expected[1]}], got {list(count_LNE.shape)}; "
        "sum the groups of a node first",
    )


def each_layer(setup: PlannerSetup, owner_LE: Tensor, seats: PlannedSeats) -> Iterator[Placement]:
    """The layers of a plan, tails cut off."""
    ends = seats.offset_LE1[:, -1].tolist()
    for layer, (end, affinity) in enumerate(zip(ends, seats.affinity_L3.tolist(), strict=True)):
        yield Placement(
            num_groups=setup.num_groups,
            owner_ES=owner_LE[layer].unsqueeze(1),
            offset_E1=seats.offset_LE1[layer],
            holder_Z=seats.holder_LZ[layer, :end],
            weight_Z=seats.weight_LZ[layer, :end],
            affinity=Affinity(*affinity),
            domain_size=setup.groups_per_node,
            num_shards=setup.num_shards,
        )
