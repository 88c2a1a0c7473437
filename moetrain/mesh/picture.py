"""Draws a folding: its nodes, once as attention sees them and once as experts do."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from moetrain.config.errors import require
from moetrain.config.mesh import ATTENTION_AXES, EXPERT_AXES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moetrain.mesh.folded_mesh import FoldedMesh
    from moetrain.mesh.report import AxisReport

MOST_NODES = 16  # drawn; the rest is told in words
INNER = {"attention": ("cp", "tp"), "experts": ("ep", "etp")}  # axes that carry most of the traffic
CELL, GAP, HEAD = 1.0, 0.35, 0.5
# Neighbouring groups get neighbours of this list, so that they are told apart; after ten it begins again.
COLOURS = ("#9cc4e0", "#f2c38f", "#a8d5a2", "#e4a6a1", "#c5b3de",
           "#d9c9a3", "#f3b8d6", "#b9c0c4", "#dfe08a", "#8fd3d6")  # fmt: skip


def in_text(mesh: "FoldedMesh") -> list[Text]:
    """The picture for a terminal: a line for each node, in which ranks of one group have one colour and one letter."""
    num_nodes = mesh.node_of(mesh.world_size - 1) + 1
    wide = len(str(mesh.world_size - 1))
    lines = []
    for title, inner in INNER.items():
        number = _group_numbers(mesh, inner)
        lines.append(Text(f"{title}: one letter, {_grouped(mesh, inner)}", "bold"))
        for node in range(min(num_nodes, MOST_NODES)):
            line = Text(f"  node {node:<{len(str(MOST_NODES))}}")
            for rank in range(node * mesh.ranks_per_node, min((node + 1) * mesh.ranks_per_node, mesh.world_size)):
                style = f"black on {COLOURS[number[rank] % len(COLOURS)]}"
                line.append(" ").append(f" {rank:>{wide}} {_letter(number[rank])} ", style)
            lines.append(line)
    if num_nodes > MOST_NODES:
        lines.append(Text(f"  ... and {num_nodes - MOST_NODES} more nodes"))
    return lines


def _group_numbers(mesh: "FoldedMesh", inner: tuple[str, ...]) -> dict[int, int]:
    """By rank, the index of its group along ``inner``."""
    return {rank: index for index, group in enumerate(mesh.all_groups(inner)) for rank in group}


def _grouped(mesh: "FoldedMesh", inner: tuple[str, ...]) -> str:
    inside = [axis for axis in inner if mesh.size(axis) > 1]
    return f"a group along {' and '.join(inside)}" if inside else "every rank alone"


def _letter(number: int) -> str:
    """a, ..., z, aa, ab, ..."""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def draw(mesh: "FoldedMesh", axes: Sequence["AxisReport"], path: Path) -> None:
    """Write the picture; the ending of ``path`` says the format.

    Raises:
        ValueError: matplotlib is missing, or cannot write such a format.
    """
    figure = figure_of(mesh, axes)
    kind = path.suffix.removeprefix(".").lower()
    supported = figure.canvas.get_supported_filetypes()
    require(kind in supported, f"--draw: {path.name} must end in .png, .svg or .pdf, got {path.suffix!r}")
    figure.savefig(path, dpi=150)


def figure_of(mesh: "FoldedMesh", axes: Sequence["AxisReport"]) -> "Figure":
    """A row of cells for each node, once for attention and once for experts, and the axes in words below.

    Ranks of one colour are a group along cp and tp above, along ep and etp below.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--draw needs matplotlib; pip install 'moetrain[figures]'") from error
    num_nodes = mesh.node_of(mesh.world_size - 1) + 1
    columns = min(mesh.ranks_per_node, mesh.world_size)
    shown = min(num_nodes, MOST_NODES)
    figure = Figure(figsize=(2.4 + 0.95 * columns, 2.2 + 2 * (HEAD + 0.62 * shown) + 0.22 * len(axes)))
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1)
    _panel(top, mesh, shown, "attention", ATTENTION_AXES)
    _panel(bottom, mesh, shown, "experts", EXPERT_AXES)
    wide = max(len(f"{axis.axis} = {axis.size}") for axis in axes)
    sizes = [f"{f'{axis.axis} = {axis.size}':<{wide}}  {axis.verdict}: {axis.travels}" for axis in axes]
    more = f"\n{num_nodes - shown} more nodes are not drawn" if num_nodes > shown else ""
    figure.suptitle(f"{mesh.world_size} ranks, {mesh.ranks_per_node} to a node", x=0.02, ha="left", weight="bold")
    figure.text(0.02, 0.01, "\n".join(sizes) + more, va="bottom", ha="left", fontsize=8, family="monospace")
    foot = (0.22 * (len(axes) + bool(more)) + 0.25) / figure.get_figheight()
    figure.tight_layout(rect=(0.0, foot, 1.0, 0.98))
    return figure


def _panel(ax: Any, mesh: "FoldedMesh", num_nodes: int, title: str, axes: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    used = [axis for axis in axes if mesh.size(axis) > 1]
    number = _group_numbers(mesh, INNER[title])
    ax.set_title(f"{title}   (one colour: {_grouped(mesh, INNER[title])})", loc="left", fontsize=9)
    for node in range(num_nodes):
        y = -node * (CELL + GAP)
        ax.text(-0.15, y + CELL / 2, f"node {node}", ha="right", va="center", fontsize=8)
        for place in range(mesh.ranks_per_node):
            rank = node * mesh.ranks_per_node + place
            if rank >= mesh.world_size:
                break
            colour = COLOURS[number[rank] % len(COLOURS)]
            ax.add_patch(Rectangle((place, y), 0.94, CELL, facecolor=colour, edgecolor="#444444", linewidth=0.6))
            ax.text(place + 0.47, y + CELL - 0.1, str(rank), ha="center", va="top", fontsize=8, weight="bold")
            lines = "\n".join(f"{axis} {mesh.coordinate(rank, axis)}" for axis in used)
            ax.text(place + 0.47, y + 0.05, lines, ha="center", va="bottom", fontsize=6.0, linespacing=1.15)
    columns = min(mesh.ranks_per_node, mesh.world_size)
    ax.set_xlim(-1.0, columns + 0.05)
    ax.set_ylim(-(num_nodes - 1) * (CELL + GAP) - 0.1, CELL + 0.1)
    ax.axis("off")
