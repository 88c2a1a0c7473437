"""``moetrain sequences``: how a planner would deal sequences of given lengths out to ranks.

moetrain sequences --lengths github --ranks 64 --block 8 --context 131072 --capacity 8192
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from moetrain.cli.files import require_file, write_file
from moetrain.cli.parser import Parser
from moetrain.config.errors import naming, require, require_at_least, require_divides
from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES
from moetrain.sequence.lengths import SHARES, draw_lengths
from moetrain.sequence.plan import Ints, SequencePlan
from moetrain.sequence.planner import StepPlanner
from moetrain.sequence.timeline import MOST_LINES, Timeline
from moetrain.train.sequence_profile import SequenceProfile

PLANNERS = ("data", "context", "bytescale", "moetrain")
ROUNDS = 4  # of full ranks, where nobody says how many tokens a step has


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 shown, 2 refused."""
    console, complaints = Console(), Console(stderr=True)
    try:
        options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
        require_file("--json", options.json)
        lengths = _lengths(options)
        plan = _planner(options).plan(np.stack((np.arange(len(lengths)), lengths, lengths), axis=1))
        timeline = Timeline.of(plan, equal_rounds=options.equal_rounds)
        _show(options, plan, timeline, console)
        if options.json is not None:
            write_file("--json", options.json, json.dumps(_to_json(options, plan, timeline), indent=1) + "\n")
    except (ValueError, OSError) as error:
        complaints.print(f"moetrain sequences: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moetrain sequences", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = " or ".join(SHARES)
    add("--lengths", required=True, metavar="FILE", help=f"a file with a length on each line, or {names} to draw some")
    add("--ranks", type=int, required=True, help="ranks that sequences are dealt out to (without tp)")
    add("--block", type=int, default=1, help="neighbouring ranks that share experts' all-to-alls; 1 by default")
    add("--tokens", type=int, help=f"of the step, where lengths are drawn; by default {ROUNDS} full rounds")
    add("--context", type=int, default=131072, help="tokens of the longest sequence; 131072 by default")
    add("--capacity", type=int, default=8192, help="tokens that a rank holds in a round; 8192 by default")
    add("--planner", choices=PLANNERS, default="moetrain", metavar="NAME", help=f"of {', '.join(PLANNERS)}")
    add("--cp", type=int, default=1, help="ranks of each gang under planner context")
    add("--equal-rounds", action="store_true", help="all ranks wait for one another in each round, as FSDP makes them")
    add("--costs", type=Path, metavar="FILE", help="profile.json of a run whose costs to weigh by (train --profile)")
    add("--seed", type=int, default=0, help="of drawn lengths")
    add("--json", type=Path, help="write the plan here")
    return parser


def _lengths(options: argparse.Namespace) -> Ints:
    require_at_least("--ranks", options.ranks, 1)
    require_at_least("--block", options.block, 1)
    require_at_least("--capacity", options.capacity, 1)
    require_at_least("--context", options.context, 1)
    require_divides("--block", options.block, "--ranks", options.ranks)
    require_at_least("--cp", options.cp, 1)
    require_divides("--cp", options.cp, "--ranks", options.ranks)
    if options.lengths in SHARES:
        tokens = ROUNDS * options.ranks * options.capacity if options.tokens is None else options.tokens
        require_at_least("--tokens", tokens, 1)
        require_at_least("--seed", options.seed, 0)
        return draw_lengths(options.lengths, tokens, options.context, seed=options.seed)
    with naming("--lengths", f"name a file with a whole number on each line, or {' or '.join(SHARES)}"):
        words = Path(options.lengths).read_text(encoding="utf-8").split()
        found = [int(word) for word in words if _is_length(word)]
        wrong = next((word for word in words if not _is_length(word)), None)
        require(wrong is None, f"it must hold numbers of at least 1, got {str(wrong)[:40]!r}")
    require(max(found, default=0) <= options.context, f"--context {options.context} is less than the longest sequence")
    return np.array(found, np.int64)


def _is_length(word: str) -> bool:
    return word.isascii() and word.isdigit() and 1 <= int(word) < 1 << 40


def _planner(options: argparse.Namespace) -> StepPlanner:
    return StepPlanner(
        planner=options.planner,
        num_ranks=options.ranks,
        block=options.block,
        equal_rounds=options.equal_rounds,
        gang=options.cp,
        micro_batch=None,
        capacity=options.capacity,
        costs=UNMEASURED_SEQUENCES if options.costs is None else SequenceProfile.read(options.costs).costs,
    )


def _show(options: argparse.Namespace, plan: SequencePlan, timeline: Timeline, console: Console) -> None:
    for line in timeline.draw():
        console.print(line, soft_wrap=True)
    gangs = int((np.diff(plan.rank_offset_I1) > 1).sum())
    bound, end = plan.lower_bound_ms, plan.est_makespan_ms
    tokens = plan.num_tokens_of_ranks()
    lines = [
        f"{len(plan.sequence_N3):,} sequences of {plan.num_tokens:,} tokens on {options.ranks:,} ranks in blocks of "
        f"{options.block}: {plan.num_items:,} items, of which {gangs:,} are of several ranks, in up to "
        f"{int(plan.rounds_R.max())} rounds",
        f"{end:.1f} ms, {end / bound if bound else 1:.3f} times the least that any plan takes ({bound:.1f} ms); ranks "
        f"compute {timeline.busy_share():.1%} of it, {int(tokens.min()):,} to {int(tokens.max()):,} tokens each",
        "modelled: times are those of a layer of ByteScale's 7B model, not of this machine"
        if options.costs is None
        else f"by the costs of {options.costs}",
    ]
    if options.ranks > MOST_LINES:
        lines.insert(0, f"some of {options.ranks:,} ranks are drawn; a capital letter is a gang, a dot waits")
    for text in lines:
        console.print(text, highlight=False, soft_wrap=True)


def _to_json(options: argparse.Namespace, plan: SequencePlan, timeline: Timeline) -> dict[str, Any]:
    return {
        "lengths": options.lengths,
        "planner": options.planner,
        "ranks": options.ranks,
        "block": options.block,
        "capacity": options.capacity,
        "makespan_ms": plan.est_makespan_ms,
        "lower_bound_ms": plan.lower_bound_ms,
        "tokens_per_rank": plan.num_tokens_of_ranks().tolist(),
        "rounds": plan.rounds_R.tolist(),
        "items": [
            {
                "gid": item.gid,
                "round": item.round,
                "sequences": list(item.sequence_ids),
                "ranks": list(item.ranks),
                "begin_ms": timeline.begin_of(item),
                "ms": item.est_ms,
            }
            for item in timeline.items
        ],
    }
