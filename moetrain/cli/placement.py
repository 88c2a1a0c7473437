"""``moetrain placement``: what planners would have made of recorded loads, one step ahead.

moetrain placement --trace runs/mine --slots 2 --nodes 4
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moetrain.cli.files import require_file, write_file
from moetrain.cli.parser import Parser
from moetrain.config.errors import require, require_at_least, require_divides
from moetrain.cost.step_costs import UNMEASURED, StepCosts
from moetrain.placement.planner.plan import PLANNERS, PlannerSetup
from moetrain.placement.planner.predict import PREDICTORS
from moetrain.placement.planner.replay import Replayed, ReplayRules, counts_per_node, replay
from moetrain.placement.trace import Trace

DEFAULT = ("static", "hecate", "moetrain", "full")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 shown, 2 refused."""
    console, complaints = Console(), Console(stderr=True)
    try:
        options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
        require_file("--json", options.json)
        trace = Trace.load(options.trace)
        costs, origin = _costs(options.costs, trace)
        setup = _setup(options, trace, costs)
        rules = ReplayRules(options.predictor, options.move_owners_every)
        counts = counts_per_node(torch.from_numpy(trace.count), setup.num_nodes)
        found = replay(setup, options.planner or DEFAULT, counts, rules)
        _show(trace, setup, found, origin, console)
        if options.json is not None:
            text = json.dumps(_to_json(options.trace, trace, setup, rules, found, origin), indent=1)
            write_file("--json", options.json, text + "\n")
    except (ValueError, OSError) as error:
        complaints.print(f"moetrain placement: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moetrain placement", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="a trace: a run's folder, or one .npz file of it")
    add(
        "--planner",
        nargs="+",
        choices=PLANNERS,
        metavar="NAME",
        help=f"of {', '.join(PLANNERS)}; all but random by default",
    )
    add("--slots", type=int, default=2, help="replicas that a group may hold of each layer's experts; 2 by default")
    add("--groups", type=int, help="groups of ranks that hold experts (without etp: ranks); by default the trace's")
    add("--nodes", type=int, help="that they are on, evenly; by default the trace's")
    add("--predictor", choices=tuple(PREDICTORS), default="ema", help="what the next loads are expected to be")
    add("--move-owners-every", type=int, default=0, metavar="STEPS", help="owners may move then; never by default")
    add("--costs", type=Path, metavar="FILE", help="JSON of what things cost; by default what the trace's run measured")
    add("--json", type=Path, help="write everything here")
    return parser


def _setup(options: argparse.Namespace, trace: Trace, costs: StepCosts) -> PlannerSetup:
    num_groups = trace.num_sources if options.groups is None else options.groups
    require_at_least("--groups", num_groups, 1)
    recorded = trace.num_sources // trace.facts.groups_per_node
    num_nodes = recorded if options.nodes is None else options.nodes
    require_at_least("--nodes", num_nodes, 1)
    require_divides("--nodes", num_nodes, "the groups", num_groups)
    require(
        0 <= options.slots <= trace.num_experts,
        f"--slots must be between 0 and the number of experts, {trace.num_experts}, got {options.slots}",
    )
    return PlannerSetup("static", trace.num_experts, num_groups, num_groups // num_nodes, options.slots, costs)


def _costs(path: Path | None, trace: Trace) -> tuple[StepCosts, str]:
    """What to weigh by, and whose it is."""
    if path is not None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            require(isinstance(values, dict), "it is no JSON object")
            return StepCosts.from_dict(values), f"of {path}"
        except (OSError, ValueError) as error:
            raise ValueError(f"--costs {path} must hold costs as JSON ({error}); leave it out to use others") from error
    if trace.facts.costs:
        return StepCosts.from_dict(trace.facts.costs), "measured by the trace's run"
    return UNMEASURED, "guessed: nothing was measured"


def _show(trace: Trace, setup: PlannerSetup, found: Sequence[Replayed], origin: str, console: Console) -> None:
    num_layers = len(trace.layers)
    console.print(
        f"steps {trace.first_step} to {trace.last_step}, {num_layers} layer(s) of {setup.num_experts} experts, on "
        f"{setup.num_groups} group(s) on {setup.num_nodes} node(s), {setup.slots} slot(s)",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    columns = ("planner", "load, given", "load, next", "step", "between nodes", "replicas", "moves")
    for column in columns:
        table.add_column(column, justify="left" if column == "planner" else "right")
    for one in found:
        ratios = (one.load_given, one.load_next, one.step_ratio, one.far_rows)
        table.add_row(one.planner, *(f"{ratio:.3f}" for ratio in ratios), f"{one.replicas:.1f}", str(one.owner_moves))
    console.print(table)
    console.print(
        "load: pairs of the worst group over the mean, planned for the very loads, and for those expected from earlier "
        f"steps (off by {found[0].prediction_error:.3f} of all pairs). step, between nodes: modelled seconds of the "
        f"MoE layers, and rows of the worst group, over static expert parallelism's. Costs: {origin}.",
        highlight=False,
        soft_wrap=True,
    )


def _to_json(
    path: Path, trace: Trace, setup: PlannerSetup, rules: ReplayRules, found: Sequence[Replayed], origin: str
) -> dict[str, Any]:
    return {
        "trace": str(path),
        "steps": [trace.first_step, trace.last_step],
        "layers": list(trace.layers),
        "num_experts": setup.num_experts,
        "groups": setup.num_groups,
        "nodes": setup.num_nodes,
        "slots": setup.slots,
        "predictor": rules.predictor,
        "move_owners_every": rules.move_owners_every,
        "costs": setup.costs.to_dict(),
        "costs_are": origin,
        "planners": [one.to_json() for one in found],
    }
