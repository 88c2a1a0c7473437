"""``moetrain mesh``: who stands where on the two meshes of a folding, and which axes cross nodes.

moetrain mesh --mesh dp=2,cp=2,tp=2 --experts ep=4,etp=2 --ranks-per-node 8
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.config.errors import require
from moetrain.config.mesh import ATTENTION_AXES, EXPERT_AXES, parse_axes
from moetrain.mesh.folded_mesh import FoldedMesh

MOST_SHOWN = 64  # ranks whose places are printed; --json has all


@dataclass(frozen=True, slots=True)
class AxisReport:
    """One axis of the meshes: its size, its groups, and how many of them have ranks on several nodes."""

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
        return cls(axis, mesh.size(axis), len(groups), crossing, groups[0])

    @property
    def verdict(self) -> str:
        """In words."""
        if self.size == 1:
            return "nothing travels"
        if self.num_crossing == 0:
            return "inside a node"
        everything = self.num_crossing == self.num_groups
        return "crosses nodes" if everything else f"{self.num_crossing} of {self.num_groups} groups cross nodes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 shown, 2 refused."""
    console, complaints = Console(), Console(stderr=True)
    try:
        options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
        mesh = mesh_of(options.mesh, options.experts, options.ranks, options.ranks_per_node)
        axes = [AxisReport.of(mesh, axis) for axis in axes_of(mesh)]
        if options.json is not None:
            options.json.write_text(json.dumps(to_json(mesh, axes), indent=1) + "\n")
        show(mesh, axes, console)
        if options.draw is not None:
            from moetrain.cli.mesh_picture import draw

            draw(mesh, axes, options.draw)
            console.print(f"picture: {options.draw}", highlight=False)
    except (ValueError, OSError) as error:
        complaints.print(f"moetrain mesh: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def mesh_of(attention: str, experts: str, ranks: int | None, ranks_per_node: int) -> FoldedMesh:
    """The folding that the options name; an unnamed axis is 1, except that dp_shard and edp are what remains.

    Raises:
        ValueError: no such folding exists; the nearest ones are listed.
    """
    first = parse_axes(attention, "--mesh", ATTENTION_AXES)
    second = parse_axes(experts, "--experts", EXPERT_AXES[1:])
    stages = first.get("pp", 1)
    world = ranks if ranks is not None else stages * max(prod(first.values()) // stages, prod(second.values()))
    for axes, rest, option in ((first, "dp_shard", "--mesh"), ({"pp": stages, **second}, "edp", "--experts")):
        known = prod(axes.values())
        if rest not in axes:
            require(
                world % known == 0,
                f"{option}: its axes multiply to {known}, which must divide the {world} ranks; change one of them",
            )
            (first if rest == "dp_shard" else second)[rest] = world // known
        elif ranks is not None:
            require(
                world == known,
                f"{option}: its axes multiply to {known}, but --ranks is {world}; leave one of them out",
            )
    sizes: dict[str, Any] = {**first, **second}
    return FoldedMesh(**sizes, ranks_per_node=ranks_per_node)


def axes_of(mesh: FoldedMesh) -> list[str]:
    """Axes by name, those of size 1 left out unless all are, attention's first."""
    names = [*ATTENTION_AXES, *EXPERT_AXES[1:]]
    return [axis for axis in names if mesh.size(axis) > 1] or names[1:]


def coordinates(mesh: FoldedMesh, rank: int, axes: Sequence[str]) -> str:
    """Like ``dp_shard 1 tp 0``, axes of size 1 left out."""
    return " ".join(f"{axis} {mesh.coordinate(rank, axis)}" for axis in axes if mesh.size(axis) > 1)


def show(mesh: FoldedMesh, axes: Sequence[AxisReport], console: Console) -> None:
    """Print both tables."""
    num_nodes = mesh.node_of(mesh.world_size - 1) + 1
    table = Table(title=f"{mesh.world_size} ranks on {num_nodes} node(s) of {mesh.ranks_per_node}")
    for column in ("axis", "size", "groups", "first group", "where"):
        table.add_column(column, justify="right" if column in ("size", "groups") else "left")
    for axis in axes:
        style = "yellow" if axis.num_crossing and axis.size > 1 else "green"
        first = _ranks(axis.first_group)
        table.add_row(axis.axis, str(axis.size), str(axis.num_groups), first, Text(axis.verdict, style))
    console.print(table)

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


def to_json(mesh: FoldedMesh, axes: Sequence[AxisReport]) -> dict[str, Any]:
    """Everything, as plain values."""
    names = (*ATTENTION_AXES, *EXPERT_AXES[1:])
    return {
        "sizes": {axis: mesh.size(axis) for axis in names},
        "ranks_per_node": mesh.ranks_per_node,
        "axes": {
            axis.axis: {"size": axis.size, "groups": axis.num_groups, "groups_across_nodes": axis.num_crossing}
            for axis in axes
        },
        "ranks": [
            {"rank": rank, "node": mesh.node_of(rank), **{axis: mesh.coordinate(rank, axis) for axis in names}}
            for rank in range(mesh.world_size)
        ],
    }


def _ranks(ranks: Sequence[int]) -> str:
    """``0, 4, 8, 12``, or with its middle left out where that is long."""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return ", ".join(map(str, ranks[:3])) + f", ... {ranks[-1]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moetrain mesh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mesh", default="", metavar="AXES", help="attention axes, of pp, dp_replicate, dp (dp_shard), cp, tp")
    add("--experts", default="", metavar="AXES", help="expert axes, of edp, ep, etp")
    add("--ranks", type=int, help="all ranks; by default what the axes multiply to")
    add("--ranks-per-node", type=int, default=8)
    add("--json", type=Path, help="write everything here")
    add("--draw", type=Path, metavar="FILE", help="draw it, as .png, .svg or .pdf (needs matplotlib)")
    return parser
