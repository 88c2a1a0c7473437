"""What the best plan of a few sequences takes: CP-SAT of OR-tools, on any ranks, without rounds. See bench_hdp.py.

Any plan of ours is one of these, so that its time over theirs is a gap from above: round numbers and neighbouring lanes
are ours alone. An item costs nothing here, as else packs would gain.
"""

import importlib
import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moetrain.config.sequence import largest_share
from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES, SequenceCosts
from moetrain.sequence import StepPlanner
from moetrain.sequence.lengths import draw_lengths

K = 1 << 10
CAPACITY, MOST = 8 * K, 28  # sequences
UNITS = 1e3  # of a millisecond: times are whole numbers
CASES = [(8, 64 * K, 32 * K), (8, 128 * K, 32 * K), (8, 256 * K, 64 * K), (4, 64 * K, 16 * K), (16, 128 * K, 64 * K)]
COSTS = SequenceCosts(
    *(replace(one, item_ms=0.0) for one in (UNMEASURED_SEQUENCES.forward, UNMEASURED_SEQUENCES.backward))
)


@dataclass(frozen=True, slots=True)
class Gap:
    """Of one case, and whether the solver has proven its plan the best."""

    ranks: int
    sequences: int
    over_exact: float
    proven: bool


def is_installed() -> bool:
    """Whether there is OR-tools."""
    return importlib.util.find_spec("ortools") is not None


def gaps(seeds: int, limit_s: float) -> list[Gap]:
    """Our planner over the solver, in cases of 9 to 28 sequences."""
    found = []
    for num_ranks, num_tokens, context in CASES:
        for name in ("github", "byted"):
            for seed in range(seeds):
                lengths = np.sort(draw_lengths(name, num_tokens, context, seed=seed))[::-1][:MOST].copy()
                best_ms, proven = _solve(lengths.tolist(), num_ranks, limit_s)
                planner = StepPlanner(
                    planner="moetrain", num_ranks=num_ranks, block=1, equal_rounds=False, gang=1, micro_batch=None,
                    capacity=CAPACITY, costs=COSTS,
                )  # fmt: skip
                plan = planner.plan(np.stack((np.arange(len(lengths)), lengths, lengths), axis=1))
                found.append(Gap(num_ranks, len(lengths), plan.est_makespan_ms / best_ms, proven))
    return found


def _solve(lengths: list[int], num_ranks: int, limit_s: float) -> tuple[float, bool]:
    """The least makespan found, and whether it is the least there is."""
    cp_model: Any = importlib.import_module("ortools.sat.python.cp_model")
    model = cp_model.CpModel()
    most = 10**9
    end = model.new_int_var(0, most, "end")
    intervals, widths, work = [], [], []
    for n in lengths:
        begin, chosen = model.new_int_var(0, most, ""), []
        for d in range(1, num_ranks + 1):
            if largest_share(n, d) > CAPACITY:
                continue
            is_chosen, units = model.new_bool_var(""), round(COSTS.ms(n, d) * UNITS)
            intervals.append(model.new_optional_fixed_size_interval_var(begin, units, is_chosen, ""))
            widths.append(d)
            work.append(units * d * is_chosen)
            chosen.append(is_chosen)
            model.add(begin + units <= end).only_enforce_if(is_chosen)
        model.add_exactly_one(chosen)
    model.add_cumulative(intervals, widths, num_ranks)
    model.add(sum(work) <= num_ranks * end)
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    status = solver.solve(model)
    return solver.objective_value / UNITS, status == cp_model.OPTIMAL
