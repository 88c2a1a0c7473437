"""What `moetrain mesh` says of a folding: who stands where on its two meshes, and which axes and groups cross nodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.config.errors import require, require_at_least
from moetrain.config.mesh import ATTENTION_AXES, EXPERT_AXES, MeshConfig, nearest_axes, parse_axes
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.picture import in_text
from moetrain.mesh.sharing import OF, sharing

MOST_SHOWN = 64  # ranks whose places are printed; --json has all
MOST_RANKS = 65_536
MESSAGES = {
    "pp": "activations between stages",
    "dp_replicate": "dense gradients",
    "dp_shard": "dense weights and gradients",
    "cp": "keys and values",
    "tp": "tokens, around attention",
    "edp": "expert weights and gradients",
    "ep": "tokens, to their experts",
    "etp": "tokens, to shards of an expert",
}


@dataclass(frozen=True, slots=True)
class AxisReport:
    """One axis of the meshes, or named set: its size, its groups, and how many of them have ranks on several nodes."""

    axis: str
    size: int
    num_groups: int
    num_crossing: int
    first_group: tuple[int, ...]

    @classmethod
    def of(cls, mesh: FoldedMesh, axis: str) -> "AxisReport":
        """Look at every group along ``axis``."""
        groups = mesh.all_groups(axis)
        crossing = sum(len({mesh.node_of(rank) for rank in ranks}) > 1 for ranks in groups)
        return cls(axis, len(groups[0]), len(groups), crossing, groups[0])

    @property
    def travels(self) -> str:
        """What ranks along the axis send each other."""
        return MESSAGES[self.axis] if self.size > 1 else "nothing"

    @property
    def verdict(self) -> str:
        """In words."""
        if self.size == 1:
            return "one rank"
        if self.num_crossing == 0:
            return "inside a node"
        everything = self.num_crossing == self.num_groups
        return "crosses nodes" if everything else f"{self.num_crossing} of {self.num_groups} groups cross nodes"


@dataclass(frozen=True, slots=True)
class CommunicatorReport:
    """The names of groups that have the same ranks and share a communicator.

    So it is on GPUs. On CPUs, groups that tokens travel along also share with others of the same ranks.
    """

    names: tuple[str, ...]
    groups: AxisReport

    @property
    def is_one_axis(self) -> bool:
        """Whether there is nothing to tell but of an axis."""
        return len(self.names) == 1 and self.names[0] in (*ATTENTION_AXES, *EXPERT_AXES)

    @classmethod
    def all_of(cls, mesh: FoldedMesh) -> tuple["CommunicatorReport", ...]:
        """Every communicator that a rank has, in the order of their creation."""
        names: dict[str, list[str]] = {}
        for name, first in sharing(mesh, rows_apart=True).items():
            names.setdefault(first, []).append(name)
        return tuple(
            cls(tuple(together), AxisReport.of(mesh, OF.get(first, first))) for first, together in names.items()
        )


def mesh_of(
    attention: str, experts: str, ranks: int | None, ranks_per_node: int, *, two_level: bool = False
) -> FoldedMesh:
    """The folding that the options name; an unnamed axis is 1, except that dp_shard and edp are what remains.

    Raises:
        ValueError: no such folding exists, and the nearest ones are listed; or two levels do not fit the nodes.
    """
    first = parse_axes(attention, "--mesh", ATTENTION_AXES)
    second = parse_axes(experts, "--experts", EXPERT_AXES[1:])
    if ranks is not None:
        require_at_least("--ranks", ranks, 1)
    stages = first.get("pp", 1)
    world = ranks if ranks is not None else stages * max(prod(first.values()) // stages, prod(second.values()))
    require(world <= MOST_RANKS, f"at most {MOST_RANKS} ranks can be shown, got {world}; show fewer of the same kind")
    _fill(first, ATTENTION_AXES, "dp_shard", world, "--mesh")
    _fill(second, EXPERT_AXES[1:], "edp", world // stages, "--experts")
    sizes: dict[str, Any] = {**first, **second}
    return FoldedMesh(**sizes, ranks_per_node=ranks_per_node, two_level=two_level)


def _fill(axes: dict[str, int], names: Sequence[str], rest: str, total: int, option: str) -> None:
    """Give each of ``names`` a size in ``axes``: 1 where it has none, and what remains of ``total`` to ``rest``."""
    for name in names:
        if name != rest:
            axes.setdefault(name, 1)
    known = prod(axes.values())
    legal = nearest_axes({name: axes.get(name) for name in names if name == rest or axes[name] > 1}, total)
    if rest in axes:
        require(known == total, f"{option}: its axes multiply to {known}, not to {total} ranks; nearest legal: {legal}")
    require(
        total % known == 0,
        f"{option}: its axes multiply to {known}, which must divide {total} ranks; nearest legal: {legal}",
    )
    axes.setdefault(rest, total // known)


def axes_of(mesh: FoldedMesh) -> list[str]:
    """Axes by name, those of size 1 left out unless all are, attention's first."""
    names = [*ATTENTION_AXES, *EXPERT_AXES[1:]]
    return [axis for axis in names if mesh.size(axis) > 1] or names[1:]


def coordinates(mesh: FoldedMesh, rank: int, axes: Sequence[str]) -> str:
    """Where a rank stands on ``axes``, those of size 1 left out.

    >>> coordinates(FoldedMesh(dp_shard=2, tp=2, ep=4), 2, ("dp_shard", "cp", "tp"))
    'dp_shard 1 tp 0'
    """
    return " ".join(f"{axis} {mesh.coordinate(rank, axis)}" for axis in axes if mesh.size(axis) > 1)


def show(
    mesh: FoldedMesh, axes: Sequence[AxisReport], communicators: Sequence[CommunicatorReport], console: Console
) -> None:
    """Print axes, named groups, a picture and places."""
    num_nodes = mesh.node_of(mesh.world_size - 1) + 1
    table = Table(title=f"{_count(mesh.world_size, 'rank')} on {_count(num_nodes, 'node')} of {mesh.ranks_per_node}")
    for column in ("axis", "size", "groups", "first group", "what travels", "where"):
        table.add_column(column, justify="right" if column in ("size", "groups") else "left")
    for axis in axes:
        numbers, verdict = (str(axis.size), str(axis.num_groups)), _coloured(axis)
        table.add_row(axis.axis, *numbers, _ranks(axis.first_group), axis.travels, verdict)
    console.print(table)
    if named := [shared for shared in communicators if shared.groups.size > 1 and not shared.is_one_axis]:
        console.print(_group_table(named))
        console.print("On GPUs names on one line share a communicator; other axes have their own.")

    for line in in_text(mesh):
        console.print(line, soft_wrap=True)
    places = Table()
    for column in ("rank", "node", "attention", "experts"):
        places.add_column(column, justify="right" if column in ("rank", "node") else "left")
    for rank in range(min(mesh.world_size, MOST_SHOWN)):
        ends_node = (rank + 1) % mesh.ranks_per_node == 0
        attention, experts = (coordinates(mesh, rank, names) for names in (ATTENTION_AXES, EXPERT_AXES))
        places.add_row(str(rank), str(mesh.node_of(rank)), attention, experts, end_section=ends_node)
    console.print(places)
    if mesh.world_size > MOST_SHOWN:
        console.print(f"... and {mesh.world_size - MOST_SHOWN} more ranks; --json has all", highlight=False)
    console.print(how_to_train(mesh), highlight=False, soft_wrap=True)


def _group_table(communicators: Sequence[CommunicatorReport]) -> Table:
    """Those that say more than the table of axes."""
    table = Table(title="named groups")
    for column in ("name", "size", "groups", "first group", "where"):
        table.add_column(column, justify="right" if column in ("size", "groups") else "left")
    for shared in communicators:
        groups = shared.groups
        numbers = (str(groups.size), str(groups.num_groups))
        table.add_row(", ".join(shared.names), *numbers, _ranks(groups.first_group, 4), _coloured(groups))
    return table


def _coloured(groups: AxisReport) -> Text:
    return Text(groups.verdict, "yellow" if groups.num_crossing and groups.size > 1 else "green")


def how_to_train(mesh: FoldedMesh) -> str:
    """The options with which ``moetrain train`` uses this folding, or why it cannot."""
    if mesh.pp > 1:
        return "training is not built yet for pp: this folding can only be looked at"
    names = ("dp_replicate", "cp", "tp", "ep", "etp")  # dp_shard and edp are what remains of the ranks
    options = [f"--mesh.{name} {mesh.size(name)}" for name in names if mesh.size(name) > 1]
    if mesh.cp > 1:
        options.append("--sequence.planner context")
    if mesh.ranks_per_node != MeshConfig().ranks_per_node:
        options.append(f"--mesh.ranks_per_node {mesh.ranks_per_node}")
    if mesh.two_level:
        options.append("--mesh.two_level true")
    return " ".join(["train with it on", f"{_count(mesh.world_size, 'rank')}: moetrain train", *options])


def to_json(
    mesh: FoldedMesh, axes: Sequence[AxisReport], communicators: Sequence[CommunicatorReport]
) -> dict[str, Any]:
    """Everything, as plain values; groups with the same ``communicator`` share it, and have its first name there."""
    names = (*ATTENTION_AXES, *EXPERT_AXES[1:])
    return {
        "sizes": {axis: mesh.size(axis) for axis in names},
        "ranks_per_node": mesh.ranks_per_node,
        "two_level": mesh.two_level,
        "axes": {axis.axis: _numbers(axis) for axis in axes},
        "groups": {
            name: {**_numbers(shared.groups), "communicator": shared.names[0]}
            for shared in communicators
            for name in shared.names
        },
        "ranks": [
            {"rank": rank, "node": mesh.node_of(rank), **{axis: mesh.coordinate(rank, axis) for axis in names}}
            for rank in range(mesh.world_size)
        ],
    }


def _numbers(groups: AxisReport) -> dict[str, int]:
    return {"size": groups.size, "groups": groups.num_groups, "groups_across_nodes": groups.num_crossing}


def _count(number: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _ranks(ranks: Sequence[int], most: int = 8) -> str:
    """``0, 4, 8, 12``, or with its middle left out where there are more than ``most``."""
    if len(ranks) <= most:
        return ", ".join(map(str, ranks))
    return ", ".join(map(str, ranks[:3])) + f", ... {ranks[-1]}"
