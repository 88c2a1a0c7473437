"""`moetrain verify`: compare a parallelism, run on local ranks, with the oracle. See ``moetrain.verify.compare``.

Exit codes: 0 equal, 1 not equal or not finished, 2 refused.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from moetrain.cli.parser import Parser
from moetrain.cli.verify_product import main as product
from moetrain.config.errors import require
from moetrain.config.moe import RoundingRule
from moetrain.verify.compare import verify
from moetrain.verify.report import VerifyReport, versions
from moetrain.verify.spec import MUTATIONS, VerifySpec

NUM_SHOWN = 4  # tensors listed with their errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["product"]:
        return product(arguments[1:])
    console, complaints = Console(), Console(stderr=True)
    json_path = _json_path(arguments)
    try:
        options = vars(_parser().parse_args(arguments))
        _check_outcomes(json_path, options["timeout"])
        spec = VerifySpec(**{field.name: options[field.name] for field in fields(VerifySpec)})
        report = verify(spec, timeout_s=options["timeout"])
    except (ValueError, TypeError, OSError) as error:
        complaints.print(f"moetrain verify: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        _write_json(json_path, _refusal(str(error)))
        return 2
    _write_json(json_path, report.to_json())
    _show(report, console)
    return 0 if report.ok else 1


def _check_outcomes(json_path: Path | None, timeout_s: float) -> None:
    """See to it that a result can be waited for and written, before there is one."""
    require(timeout_s > 0, f"--timeout must be above 0 seconds, got {timeout_s}; 120 is the default")
    if json_path is not None:
        require(not json_path.is_dir(), f"--json must name a file, but {json_path} is a folder; add a file name")
        json_path.parent.mkdir(parents=True, exist_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moetrain verify",
        description="Compare a parallelism, run on local ranks, with an independent single-process oracle.",
        epilog="Exit code 0: equal; 1: beyond tolerance, or the run failed; 2: refused. "
        "`moetrain verify product --help` tells how to go through every folding of up to 8 ranks.",
    )
    add = parser.add_argument
    add("--ranks", type=int, default=1, help="local processes")
    add(
        "--mesh",
        default="",
        metavar="AXES",
        help="attention axes, e.g. dp=2,tp=2 or dp_replicate=2,dp_shard=2; unnamed: 1",
    )
    add("--experts", default="", metavar="AXES", help="expert axes, e.g. ep=2,etp=2; unnamed: 1, but edp what remains")
    add("--steps", type=int, help="optimizer steps (default 3 with sgd, 1 with adamw)")
    add("--optimizer", default="sgd", help="sgd or adamw")
    add("--dtype", default="float32", help="float32 or float64")
    add("--router", default="softmax", help="softmax, topk_softmax, or sigmoid (with loss-free bias)")
    add("--balance", default="lagged", help="scope of the balance loss: lagged, micro or none")
    add("--num-experts", type=int, default=8)
    add("--top-k", type=int, default=2)
    add("--shared-experts", type=int, default=1)
    add("--dense-first", type=int, default=1, help="layers with a dense MLP before those with experts")
    add("--moe-layers", type=int, default=2, help="layers with experts")
    add("--num-groups", type=int, default=1, help="groups of experts, for group-limited routing")
    add("--groups-kept", type=int, default=1)
    add("--activation", default="swiglu", help="swiglu, gelu or relu2")
    add("--rounding", default="none", help=f"token rounding: {', '.join(get_args(RoundingRule))}")
    add("--tile", type=int, default=4, help="rows of a tile, when rounding")
    add("--capacity-factor", type=float, help="drop what an expert is chosen for beyond its capacity")
    add("--capacity-by", default="weight", help="who stays within it: weight or position")
    add("--pad-to-capacity", action="store_true", help="dispatch in messages of fixed size")
    add("--two-level", action="store_true", help="dispatch to nodes first, and inside them from there")
    add("--ranks-per-node", type=int, default=8, help="of the nodes that --two-level sees")
    add("--dispatch-pieces", type=int, default=1, help="into how many a micro-batch is cut for dispatch")
    add("--accumulation", type=int, default=2, help="micro-batches of a rank per step")
    add("--rows", type=int, help="packed rows per step; fewer than ranks leaves ranks without tokens")
    add("--tie-embeddings", action="store_true")
    add("--activation-checkpoint", action="store_true")
    add("--mutate", metavar="FAULT", help=f"inject a fault that must be noticed: {', '.join(MUTATIONS)}")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=120.0, help="seconds after which a silent rank ends the run")
    add("--json", type=Path, help="write the result here, on failure too")
    return parser


def _json_path(arguments: list[str]) -> Path | None:
    """Where the result goes, known even when the other arguments are wrong."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--json", type=Path)
    try:
        return parser.parse_known_args(arguments)[0].json
    except argparse.ArgumentError:
        return None


def _refusal(error: str) -> dict[str, Any]:
    errors = dict.fromkeys(("max_rel_error_loss", "max_rel_error_grad", "max_rel_error_param"))
    return {"ok": False, **errors, "error": error, "steps": [], "versions": versions()}


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write whole or not at all."""
    if path is None or path.is_dir() or not path.parent.is_dir():
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def _show(report: VerifyReport, console: Console) -> None:
    spec, mesh = report.spec, report.spec.mesh_config()
    table = Table(
        title=f"{spec.ranks} ranks, dp_replicate={mesh.dp_replicate} dp_shard={mesh.dp_shard} tp={mesh.tp}, "
        f"edp={mesh.edp} ep={mesh.ep} etp={mesh.etp}, {spec.num_experts} experts, {spec.router}, {spec.dtype}"
    )
    table.add_column("compared")
    table.add_column("largest relative error", justify="right")
    for name, error in (
        ("loss", report.max_rel_error_loss),
        ("gradients", report.max_rel_error_grad),
        *((f"  {name}", error) for name, error in report.worst_tensors("grads", NUM_SHOWN)),
        ("parameters", report.max_rel_error_param),
        *((f"  {name}", error) for name, error in report.worst_tensors("params", NUM_SHOWN)),
    ):
        table.add_row(name, f"{error:.1e}", style="" if error <= report.tolerance else "red")
    if report.steps:
        console.print(table)
    if report.skipped_seeds:
        console.print(f"seeds passed over for near ties in routing: {list(report.skipped_seeds)}", highlight=False)
    if report.wrong_counts:
        console.print(f"expert loads that differ: {report.wrong_counts}", style="red")
    if report.error:
        console.print(report.error, style="red", markup=False, highlight=False)
    if spec.two_level:
        console.print(f"dispatch {spec.two_levels_in_words()}", highlight=False, soft_wrap=True)
    verdict = "[green]equal[/green]" if report.ok else "[red]NOT equal[/red]"
    console.print(
        f"{verdict} to the oracle within {report.tolerance:g}, {len(report.steps)} of {spec.num_steps} steps, "
        f"seed {spec.seed}, {report.seconds:.1f} s",
        highlight=False,
    )
