"""`moetrain verify`: compare a parallelism, run on local ranks, with the oracle. See ``moetrain.verify.compare``.

Exit codes: 0 equal, 1 not equal or not finished, 2 refused.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moetrain.cli.files import require_file, write_file
from moetrain.cli.parser import Parser
from moetrain.cli.verify_product import main as product
from moetrain.config.errors import require
from moetrain.config.load import parse_options
from moetrain.config.options import Option, dashed, options
from moetrain.verify.compare import verify
from moetrain.verify.mutations import MUTATIONS
from moetrain.verify.report import VerifyReport, versions
from moetrain.verify.small import DTYPES, SHORT, SMALL, TABLES, flattened
from moetrain.verify.spec import OWN, VerifySpec

ERRORS = ("max_rel_error_loss", "max_rel_error_grad", "max_rel_error_param")  # keys of every result
BARE = {"placement.rematerialise": "always"}  # what an option without a value means
NUM_SHOWN = 4  # tensors listed with their errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["product"]:
        return product(arguments[1:])
    console, complaints = Console(), Console(stderr=True)
    json_path = _json_path(arguments)
    try:
        spec, timeout_s = _spec_of(arguments)
        _check_outcomes(json_path, timeout_s)
        report = verify(spec, timeout_s=timeout_s)
    except (ValueError, TypeError, OSError) as error:
        _complain(complaints, error)
        _write_refusal(json_path, str(error))
        return 2
    _show(report, console)
    try:
        _write_json(json_path, report.to_json())
    except ValueError as error:
        _complain(complaints, error)
        return 1
    return 0 if report.ok else 1


def _complain(complaints: Console, error: Exception) -> None:
    complaints.print(f"moetrain verify: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def _check_outcomes(json_path: Path | None, timeout_s: float) -> None:
    """See to it that a result can be waited for and written, before there is one."""
    require(timeout_s > 0, f"--timeout must be above 0 seconds, got {timeout_s}; 120 is the default")
    require_file("--json", json_path)


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
    add("--steps", type=int, help="optimizer steps (default 3; 1 with adamw where experts stay)")
    add("--moe-layers", type=int, default=2, help="layers with experts")
    add("--accumulation", type=int, default=2, help="micro-batches of a rank per step")
    add("--rows", type=int, help="packed rows per step; fewer than ranks leaves ranks without tokens")
    faults = "; ".join(f"{name}: {mutation.breaks}" for name, mutation in MUTATIONS.items())
    add("--move-owners", action="store_true", help="give experts other owners before each step, once it is loaded")
    add("--mutate", metavar="FAULT", help=f"inject a fault that must be noticed: {faults}")
    add("--seed", type=int, default=0, help="of parameters and rows; a later one is taken where routing is a near tie")
    add("--timeout", type=float, default=120.0, help="seconds after which a silent rank ends the run")
    add("--json", type=Path, help="write the result here, on failure too")
    group = parser.add_argument_group(
        "fields of the scaled-down run", f"and any --TABLE.FIELD of `moetrain train` in {', '.join(TABLES)}"
    )
    for name, field in SHORT.items():
        _add_field(group, name, options()[field])
    return parser


def _add_field(group: "argparse._ArgumentGroup", name: str, option: Option) -> None:
    """An option by its short name, with what the configuration says of it; its value stays text."""
    choices = DTYPES if option.name == "train.dtype" else option.choices
    default = f"default {str(SMALL.get(option.name, option.default_text)).lower()}"
    text = f"{option.about.text} [{'; '.join([', '.join(choices), default] if choices else [default])}]"
    alone = "true" if option.kind is bool else BARE.get(option.name)
    values: dict[str, Any] = {"nargs": "?", "const": alone} if alone else {}
    group.add_argument(f"--{dashed(name)}", dest=option.name, metavar="VALUE", help=text.replace("%", "%%"), **values)


def _spec_of(arguments: list[str]) -> tuple[VerifySpec, float]:
    """The comparison that the options ask for, and how long to wait for it."""
    known, others = _parser().parse_known_args(arguments)
    given = vars(known)
    short = [word for field in SHORT.values() if (text := given[field]) is not None for word in (f"--{field}", text)]
    fields, tables = parse_options([*short, *others])
    require(not fields, f"unknown option --{next(iter(fields), '')}; see moetrain verify --help")
    own = {name: given[name] for name in OWN}
    return VerifySpec(**own, changed=tuple(flattened(tables).items())), given["timeout"]


def _json_path(arguments: list[str]) -> Path | None:
    """Where the result goes, known even when the other arguments are wrong."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--json", type=Path)
    try:
        return parser.parse_known_args(arguments)[0].json
    except argparse.ArgumentError:
        return None


def _write_refusal(path: Path | None, error: str) -> None:
    """Write why nothing was compared, so that no earlier result is taken for this one's; never over another file."""
    refusal: dict[str, Any] = {"ok": False, **dict.fromkeys(ERRORS), "error": error, "steps": []}
    if path is not None and path.parent.is_dir() and (not os.path.lexists(path) or _is_result(path)):
        with contextlib.suppress(ValueError):  # the path itself may be what was refused
            _write_json(path, {**refusal, "versions": versions()})


def _is_result(path: Path) -> bool:
    """Whether an earlier comparison wrote this file."""
    try:
        values = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return False
    if not isinstance(values, dict) or not values.keys() >= {"ok", *ERRORS}:
        return False
    by = values.get("versions")
    return isinstance(by, dict) and "moetrain" in by


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        write_file("--json", path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def _show(report: VerifyReport, console: Console) -> None:
    spec, run, mesh = report.spec, report.spec.run, report.spec.run.mesh
    table = Table(
        title=f"{spec.ranks} ranks, dp_replicate={mesh.dp_replicate} dp_shard={mesh.dp_shard} tp={mesh.tp}, "
        f"edp={mesh.edp} ep={mesh.ep} etp={mesh.etp}, {run.moe.num_experts} experts, {run.router.score}, {spec.dtype}"
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
    if mesh.two_level:
        console.print(f"dispatch {spec.two_levels_in_words()}", highlight=False, soft_wrap=True)
    verdict = "[green]equal[/green]" if report.ok else "[red]NOT equal[/red]"
    console.print(
        f"{verdict} to the oracle within {report.tolerance:g}, {len(report.steps)} of {spec.num_steps} steps, "
        f"seed {spec.seed}, {report.seconds:.1f} s",
        highlight=False,
    )
