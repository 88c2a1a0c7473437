"""Plans of sequences: how level they are, and what they take to make, on one core.

Run: python benchmarks/bench_hdp.py [--quick] [--json FILE]

Lengths drawn as ByteScale's (arXiv 2502.21231), contexts of 2M tokens, ranks that hold 8,192 each, and the costs of
``moetrain.cost.sequence_costs.UNMEASURED_SEQUENCES``: modelled, ring hops included (keys and values of 2 KiB a token
at 50 GB/s, 10 us a message). ``over bound`` is the makespan over the least that any plan takes, rounds or not. Each
plan is validated before anything is told of it. Planning, validating, encoding and hashing are what the first rank does
for a step (``planner_ms``), decoding what every other one does (``decode_ms``).

Beside it, under the same costs and rules, on the first seed: gangs of one size (``context``), ByteScale's fewest ranks
with rounds put on them (``bytescale``), the same with gangs of powers of two (``powers``), micro-batches of groups of
powers of two (``flexsp``), and ranks that level the work freely, with rounds put on them (``imposed``); see
``sequence_peers.py``.

Then, with few sequences, the gap to an exact solver (``exact_sequences.py``; where OR-tools is installed), what
attention of a gang takes in all (``bench_attend.py``), and steps that real ranks compute (``sequence_replay.py``).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bench_attend
import exact_sequences
import numpy as np
import sequence_peers
import sequence_replay
import torch
from timing import machine

from moetrain.config.sequence import largest_share
from moetrain.sequence import SequencePlan, StepPlanner
from moetrain.sequence.lengths import draw_lengths
from moetrain.sequence.plan import Ints
from moetrain.sequence.timeline import Timeline

K, M = 1 << 10, 1 << 20
CAPACITY, CONTEXT = 8 * K, 2 * M
NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Case:
    """One setting; lengths of a seed."""

    name: str
    ranks: int
    block: int
    lengths: Callable[[int], Ints]
    capacity: int = CAPACITY

    def table(self, seed: int) -> Ints:
        """Sequences as a planner takes them."""
        lengths = self.lengths(seed)
        return np.stack((np.arange(len(lengths)), lengths, lengths), axis=1)

    def planner(self, name: str, gang: int = 1) -> StepPlanner:
        """A planner of this setting."""
        return StepPlanner(
            planner=name,
            num_ranks=self.ranks,
            block=self.block,
            equal_rounds=False,
            gang=gang,
            micro_batch=None,
            capacity=self.capacity,
        )


def drawn(name: str, size: int) -> Callable[[int], Ints]:
    """Lengths of ``size`` million tokens by seed."""
    return lambda seed: draw_lengths(name, size * M, CONTEXT, seed=seed)


def cases(quick: bool) -> list[Case]:
    """All settings."""
    sizes = [(1, 1024), (32, 1024), *([] if quick else [(256, 12288)])]
    found = [
        Case(f"{name} {size}M x {ranks:,}", ranks, block, drawn(name, size))
        for size, ranks in sizes
        for name in ("github", "byted")
        for block in (1, 8, 64, ranks)
    ]
    giants = Case("five of 2M x 1,024", 1024, 8, lambda seed: np.full(5, 2 * M), capacity=16 * K)
    return [*found, giants]


def measure(case: Case, seeds: int) -> dict[str, Any]:
    """Makespans over the bound of all seeds, and the seconds of planning."""
    ratios, noisy, planner_ms, decode_ms = [], [], [], []
    for seed in range(seeds):
        table = case.table(seed)
        start = time.perf_counter()
        plan = case.planner("moetrain").plan(table)
        header, content = plan.to_arrays()
        plan.content_hash()
        planner_ms.append((time.perf_counter() - start) * 1e3)
        start = time.perf_counter()
        SequencePlan.from_arrays(header, content).items_of(case.ranks - 1)
        decode_ms.append((time.perf_counter() - start) * 1e3)
        ratios.append(plan.est_makespan_ms / plan.lower_bound_ms)
        random = np.random.Generator(np.random.Philox(seed))
        shaken = replace(plan, est_ms_I=plan.est_ms_I * random.normal(1.0, NOISE, plan.num_items).clip(0.5))
        noisy.append(Timeline.of(shaken).end_ms / plan.lower_bound_ms)
    return {
        "case": case.name,
        "ranks": case.ranks,
        "block": case.block,
        "makespan_over_bound": statistics.mean(ratios),
        "worst": max(ratios),
        "with_noise": statistics.mean(noisy),
        "planner_ms": statistics.median(planner_ms),
        "decode_ms": statistics.median(decode_ms),
    }


def peers(case: Case) -> dict[str, float]:
    """Others' makespans over ours, of the first seed."""
    table = case.table(0)
    ours = case.planner("moetrain").plan(table)
    longest = int(table[:, 1].max())
    gang = next(
        d for d in range(1, case.ranks + 1) if case.ranks % d == 0 and largest_share(longest, d) <= case.capacity
    )
    limits = (table, case.ranks, case.block, case.capacity)
    plans = {
        "context": case.planner("context", gang).plan(table),
        "bytescale": case.planner("bytescale").plan(table),
        "powers": sequence_peers.powers_of_two(*limits),
        "flexsp": sequence_peers.flexsp_like(*limits),
        "imposed": sequence_peers.free_then_rounds(*limits, ours.lower_bound_ms),
    }
    return {name: plan.est_makespan_ms / ours.est_makespan_ms for name, plan in plans.items()}


def attend_ratios(rounds: int) -> dict[str, dict[str, float]]:
    """By type and pass, what the calls of a gang take over the undivided one."""
    found = [row for dtype in (torch.float32, torch.bfloat16) for row in bench_attend.bench(dtype, rounds)]
    return {row.case: row.ratios for row in found}


def plans(quick: bool) -> list[dict[str, Any]]:
    """Print and return what becomes of all cases."""
    rows = []
    names = ("context", "bytescale", "powers", "flexsp", "imposed")
    print(f"| case | block | over bound | worst | 3 % noise | planner ms | decode ms | {' | '.join(names)} |")
    print("| --- |" + " ---: |" * (6 + len(names)))
    for case in cases(quick):
        found = measure(case, 2 if quick else 5)
        beside = peers(case) if case.ranks <= 1024 else {}
        rows.append({**found, **{f"{name}_over_ours": ratio for name, ratio in beside.items()}})
        numbers = (found["makespan_over_bound"], found["worst"], found["with_noise"])
        told = [f"{x:.3f}" for x in numbers] + [f"{found['planner_ms']:.0f}", f"{found['decode_ms']:.1f}"]
        told += [f"{beside[name]:.2f}" if beside else "" for name in names]
        print(f"| {case.name} | {case.block:,} | " + " | ".join(told) + " |", flush=True)
    return rows


def exact(quick: bool) -> dict[str, Any]:
    """Print and return the gap to an exact solver."""
    if not exact_sequences.is_installed():
        print("\nno gap to an exact solver: pip install ortools")
        return {}
    found = exact_sequences.gaps(1 if quick else 5, 5 if quick else 20)
    ratios = [gap.over_exact for gap in found]
    mean, worst, proven = statistics.mean(ratios) - 1, max(ratios) - 1, sum(gap.proven for gap in found)
    print(f"\n{len(found)} cases of few sequences: {mean:.1%} over CP-SAT's plans, worst {worst:.1%}; {proven} proven")
    return {"gap_to_exact_mean": mean, "gap_to_exact_worst": worst, "exact_cases": [asdict(gap) for gap in found]}


def computed(quick: bool) -> dict[str, Any]:
    """Print and return what steps of real ranks take under gangs of two, over ours."""
    costs = sequence_replay.measured_costs()
    replays = {ranks: sequence_replay.replayed(ranks, 2 if quick else 8, costs) for ranks in (4, 8)}
    wall = sequence_replay.on_the_wall(4 if quick else 10, costs)
    for ranks, found in replays.items():
        print(
            f"{ranks} ranks, replayed: context takes {found['replayed_over_context']:.2f} times as long "
            f"({found['compute_over_context']:.2f} without messages)"
        )
    print(
        f"2 ranks, by the clock: {wall['wall_over_context']:.2f}; planning and reading keep a step waiting for "
        f"{wall['planning_exposed']:.2%} of it"
    )
    return {
        "costs": costs.to_json(),
        "replayed_over_context": {ranks: found["replayed_over_context"] for ranks, found in replays.items()},
        "wall_over_context": {2: wall["wall_over_context"]},
        "planning_exposed": wall["planning_exposed"],
        "replays": replays,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer seeds and steps, without 12,288 ranks")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = {"machine": machine(), "planner": plans(options.quick)}
    kept |= exact(options.quick)
    kept["attend_over_undivided"] = attend = attend_ratios(3 if options.quick else 7)
    print("\nall calls of a gang's ring over the undivided call, CPU time of one thread (bench_attend.py)")
    for name, ratios in attend.items():
        print(f"{name}: " + ", ".join(f"{gang} {ratio:.2f}" for gang, ratio in ratios.items()))
    print("", flush=True)
    kept |= computed(options.quick)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
