"""``moetrain mesh``: who stands where on the two meshes of a folding, and which axes and groups cross nodes.

moetrain mesh --mesh dp=2,cp=2,tp=2 --experts ep=4,etp=2 --ranks-per-node 8
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moetrain.cli.files import require_file, write_file
from moetrain.cli.parser import Parser
from moetrain.mesh.picture import draw
from moetrain.mesh.report import AxisReport, CommunicatorReport, axes_of, mesh_of, show, to_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 shown, 2 refused."""
    console, complaints = Console(), Console(stderr=True)
    try:
        options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
        mesh = mesh_of(
            options.mesh, options.experts, options.ranks, options.ranks_per_node, two_level=options.two_level
        )
        axes = [AxisReport.of(mesh, axis) for axis in axes_of(mesh)]
        communicators = CommunicatorReport.all_of(mesh)
        for option, path in (("--json", options.json), ("--draw", options.draw)):
            require_file(option, path)
        show(mesh, axes, communicators, console)
        if options.draw is not None:
            draw(mesh, axes, options.draw)
            console.print(f"picture: {options.draw}", highlight=False)
        if options.json is not None:
            write_file("--json", options.json, json.dumps(to_json(mesh, axes, communicators), indent=1) + "\n")
    except (ValueError, OSError) as error:
        complaints.print(f"moetrain mesh: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moetrain mesh", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--mesh", default="", metavar="AXES", help="attention axes, of pp, dp_replicate, dp (dp_shard), cp, tp")
    add("--experts", default="", metavar="AXES", help="expert axes, of edp, ep, etp")
    add("--ranks", type=int, help="all ranks; by default what the axes multiply to")
    add("--ranks-per-node", type=int, default=8)
    add("--two-level", action="store_true", help="tokens cross to a node once and are spread inside it")
    add("--json", type=Path, help="write everything here")
    add("--draw", type=Path, metavar="FILE", help="draw it, as .png, .svg or .pdf (needs matplotlib)")
    return parser
