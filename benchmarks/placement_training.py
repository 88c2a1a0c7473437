"""Real training with experts that move beside static expert parallelism, in the same processes, step by step in turns.

    python benchmarks/placement_training.py --quick

The quick-start model on random tokens, gloo, one thread a rank. A bias on the router's scores sends most tokens to the
experts of the first rank, which static placement leaves there; the bias follows the router while that learns, so that
the straggler ratio stays around what is asked for. Before each pair of steps both have the same parameters, so their
losses must agree. Two ranks are timed by the clock; of four ranks on two cores the processor time that the
slowest rank's experts take says what a core of its own would see. Nothing here overlaps: gloo moves no byte beside
computation, so replicas cost what they cost.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from step_contest import one_document_each
from timing import machine

from moetrain.config import PlacementConfig, RunConfig
from moetrain.config.load import load_run
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.data_planner import plan_data
from moetrain.sequence.plan import Sequence, SequencePlan
from moetrain.testing.ranks import RankPools
from moetrain.train.engine import Engine

Figures = dict[str, Any]
MOVING = PlacementConfig(planner="moetrain", slots=2)


@dataclass
class Clock:
    """Seconds of one rank's experts in one step: by the clock, and of the processor."""

    wall: float = 0.0
    cpu: float = 0.0


class TimedOps:
    """The operators, of which those that run experts are timed while ``clock`` is set."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self.clock: Clock | None = None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._ops, name)
        if self.clock is None or name not in ("expert_mlp", "expert_mlp_backward"):
            return call
        clock = self.clock

        def timed(*args: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            result = call(*args)
            clock.wall += time.perf_counter() - wall
            clock.cpu += time.thread_time() - cpu
            return result

        return timed


@contextmanager
def timed_experts() -> Iterator[TimedOps]:
    """Put the timed operators in the place of the others."""
    expert_module: Any = import_module("moetrain.ops.expert_mlp")  # moetrain.ops has the function under that name
    original = expert_module.OPS
    timed = TimedOps(original)
    expert_module.OPS = timed
    try:
        yield timed
    finally:
        expert_module.OPS = original


@dataclass
class Competitor:
    """One engine, and what its steps took: seconds, and those of the slowest rank's experts."""

    engine: Engine
    steps: list[float] = field(default_factory=list)
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def run_of(ranks: int, placement: PlacementConfig) -> RunConfig:
    options = ["--mesh.ep", str(ranks), "--balance.loss-free", "--balance.bias-rate", "1e-12", "--balance.coef", "0"]
    run = load_run(options, default_preset="quickstart")
    data = replace(run.data, global_batch=ranks * run.data.micro_batch)
    return replace(run, placement=placement, data=data, train=replace(run.train, device="cpu", threads=1))


def contest(rank: int, bias: float, least_ratio: float, rounds: int, warm_up: int) -> Figures:
    """Both ways of placing experts, in turns, on this rank; the straggler ratio is held around one above the least."""
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    runs = {"static": run_of(ranks, PlacementConfig()), "moving": run_of(ranks, MOVING)}
    groups = {name: _groups(run, ranks) for name, run in runs.items()}
    both = {name: Competitor(Engine(run, groups[name], "cpu")) for name, run in runs.items()}
    static = both["static"].engine
    with timed_experts() as ops:
        ratio = _step(both["static"], 0, ops, keep=False)
        while ratio < least_ratio:
            bias = max(0.01, 1.3 * bias)
            for one in both.values():
                _bias_router(one.engine, bias)
            ratio = _step(both["static"], 0, ops, keep=False)
        ratios, used = [], bias
        for turn in range(warm_up + rounds):
            params = static.whole.parameters()
            for name in sorted(both, reverse=turn % 2 == 0):
                both[name].engine.whole.load(params)
                found = _step(both[name], turn, ops, keep=turn >= warm_up)
                if name == "static":
                    ratios.append(found)
            used, bias = bias, _held(bias, ratios[-1], least_ratio)
            for one in both.values():
                _bias_router(one.engine, bias)
    ratios = ratios[warm_up:]
    for made in groups.values():
        made.close()
    return {
        "straggler_ratio": statistics.median(ratios),
        "straggler_ratio_range": [min(ratios), max(ratios)],
        "bias": used,
        "step_s": {name: one.steps for name, one in both.items()},
        "expert_wall_s": {name: one.walls for name, one in both.items()},
        "expert_cpu_s": {name: one.cpus for name, one in both.items()},
        "losses": {name: one.losses for name, one in both.items()},
    }


def _held(bias: float, ratio: float, least_ratio: float) -> float:
    """The bias of the next turn: half of what brings the ratio to 5 % above the least, were it in proportion."""
    if least_ratio <= 1:
        return bias
    return bias * ((1.05 * least_ratio - 1) / max(ratio - 1, 0.05)) ** 0.5


def _groups(run: RunConfig, ranks: int) -> MeshGroups:
    return MeshGroups.create(FoldedMesh.of_run(run, ranks), device_type="cpu", timeout=timedelta(seconds=120))


def _bias_router(engine: Engine, bias: float) -> None:
    """The lower an expert's number, the more tokens choose it: those of the first rank most."""
    state = engine.balance.state_dict()
    for kept in state.values():
        kept["bias_E"] = torch.linspace(bias, 0, len(kept["bias_E"]), dtype=kept["bias_E"].dtype)
    engine.balance.load_state_dict(state)


def _step(one: Competitor, turn: int, ops: TimedOps, *, keep: bool) -> float:
    """One step; returns the pairs of the rank with most of them over the mean, had experts stayed where they were."""
    engine = one.engine
    data, vocab = engine.run.data, engine.run.model.vocab_size
    rng = torch.Generator().manual_seed(turn * 64 + engine.groups.rank)
    tokens_BS1 = torch.randint(vocab, (data.micro_batch, data.seq_len + 1), generator=rng)
    plan, batch = _batch(engine, tokens_BS1)
    dist.barrier()
    ops.clock = Clock()
    start = time.perf_counter()
    report = engine.step(plan, [batch])
    taken = time.perf_counter() - start
    times = torch.tensor([taken, ops.clock.wall, ops.clock.cpu], dtype=torch.float64)
    ops.clock = None
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    if keep:
        for seconds, value in zip((one.steps, one.walls, one.cpus), times.tolist(), strict=True):
            seconds.append(value)
        one.losses.append(report.loss)
    counts = torch.stack([kept["lagged_count_E"] for kept in engine.balance.state_dict().values()]).double()
    of_ranks = counts.unflatten(1, (dist.get_world_size(), -1)).sum(2)
    return float((of_ranks.max(1).values / of_ranks.mean(1)).mean())


def _batch(engine: Engine, tokens_BS1: torch.Tensor) -> tuple[SequencePlan, PackedBatch]:
    """Rows of one document each: the plan of a step of one round, and this rank's rows of it."""
    rows, length = tokens_BS1.shape[0], tokens_BS1.shape[1] - 1
    ranks, rank = engine.groups.size("data"), engine.groups.group_rank("data")
    plan = plan_data([Sequence(index, length, length) for index in range(ranks * rows)], ranks, rows)
    return plan, one_document_each(tokens_BS1, range(rank, ranks * rows, ranks))


def training_figures(quick: bool) -> Figures:
    """The figures of real training, for ``bench_placement.py``: ratios are moving / static, of medians in turns."""
    rounds, warm_up = (7, 3) if quick else (21, 5)
    with RankPools(timeout_s=900.0) as pools:
        skewed = pools.run(2, contest, 0.0, 1.6, rounds, warm_up)[0]
        uniform = pools.run(2, contest, 0.0, 0.0, rounds, warm_up)[0]
        four = pools.run(4, contest, 0.0, 2.0, rounds, warm_up)[0]
    found = (skewed, uniform, four)
    return {
        "step_ratio_skewed": _ratio(skewed["step_s"]),
        "step_ratio_uniform": _ratio(uniform["step_s"]),
        "expert_ratio_2": _ratio(skewed["expert_wall_s"]),
        "expert_ratio_4": _ratio(four["expert_cpu_s"]),
        "straggler_ratio": {"2 ranks": skewed["straggler_ratio"], "4 ranks": four["straggler_ratio"]},
        "largest_loss_difference": max(_difference(one["losses"]) for one in found),
        "training": dict(zip(("skewed", "uniform", "four_ranks"), found, strict=True)),
    }


def _ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(seconds["moving"]) / statistics.median(seconds["static"])


def _difference(losses: dict[str, list[float]]) -> float:
    """The largest relative difference of a step's loss."""
    pairs = zip(losses["static"], losses["moving"], strict=True)
    return max(abs(one - other) / abs(one) for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    chosen = parser.parse_args()
    print(json.dumps({"machine": machine(), **training_figures(chosen.quick)}, indent=1))


if __name__ == "__main__":
    main()
