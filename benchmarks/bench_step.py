"""Tokens per second of a whole training step, and where the time goes.

    python benchmarks/bench_step.py --preset quickstart --json out.json
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_step.py --preset quickstart --mesh.ep 2 --peer hf

Options beside those below are moetrain's own (``moetrain train --help``). Tokens are random, so routing is that of an
untrained router. The first step's loss must be log(vocabulary) before anything is timed.

The split is self time of operators in one profiled step of rank 0 (device time on a GPU). "experts" is all that happens
between dispatch and combine, elementwise work and backward included; waiting for other ranks counts as communication.

--peer hf trains the same model, from the same weights and on the same rows, with Hugging Face transformers in the same
processes, and takes turns with it. A trial of every implementation of its experts, under DDP on all ranks and in one
process with all their cores, in our type of compute and in float32, the fastest with half our micro-batch as well, says
which are timed; the ratio is to the fastest.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report each start on stderr

import argparse
import json
import math
import statistics
import sys
from datetime import timedelta
from pathlib import Path

import torch
from step_contest import Contest, ours_only, with_hugging_face
from step_profile import profiled_split
from timing import machine

from moetrain import _C
from moetrain.config.load import load_run
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.train.engine import Engine
from moetrain.train.world import World, keep_freed_memory, process_group, set_threads


def main() -> None:
    chosen, rest = parse(sys.argv[1:])
    run = load_run(rest, default_preset="quickstart")
    world = World.from_environment()
    mesh = FoldedMesh.from_config(run.mesh, world.size)
    device = world.device(run.train.device)
    threads = set_threads(run.train, world)
    keep_freed_memory(device)  # for the peer as well: it runs in this process
    with process_group(world, device, run.train.timeout_s):
        groups = MeshGroups.create(mesh, device_type=device.type, timeout=timedelta(seconds=run.train.timeout_s))
        engine = Engine(run, groups, device)
        contest = with_hugging_face(engine, world, threads) if chosen.peer == "hf" else ours_only(engine)
        contest.race(chosen.warm_up, chosen.rounds)
        split = profiled_split(engine)
        groups.close()
    if world.rank == 0:
        report(contest, engine, world, threads, split, chosen.json)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each competitor")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each before them")
    parser.add_argument("--peer", choices=("hf",), default=None, help="train with transformers too, in turns")
    return parser.parse_known_args(arguments)


def report(
    contest: Contest, engine: Engine, world: World, threads: int, split: dict[str, float], path: Path | None
) -> None:
    run = engine.run
    tokens = run.data.global_batch * run.data.seq_len
    seconds = contest.seconds["moetrain"]
    median = statistics.median(seconds)
    result = {
        "tokens_per_second": tokens / median,
        "step_seconds_median": median,
        "step_seconds": seconds,
        "tokens_per_step": tokens,
        "parameters": engine.num_parameters(),
        "dtype": str(engine.store.compute_dtype).removeprefix("torch."),
        "split": split,
        "split_seconds": {name: share * median for name, share in split.items()},
        "first_loss": contest.first_loss["moetrain"],
        "expected_first_loss": math.log(run.model.vocab_size),
        "ranks": world.size,
        "threads_per_rank": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": _C.cpu_isa(),
        "machine": machine(),
    }
    print(
        f"{tokens / median:,.0f} tokens/s, {median:.3f} s per step of {tokens} tokens on {world.size} rank(s) with "
        f"{threads} thread(s) each, {result['dtype']}, {engine.num_parameters() / 1e6:.2f} M parameters"
    )
    print("  ".join(f"{name} {share:.0%} ({1e3 * share * median:.0f} ms)" for name, share in split.items()))
    peers = {name: statistics.median(taken) for name, taken in contest.seconds.items() if name != "moetrain"}
    if peers:
        result["peers"] = {
            name: {
                "tokens_per_second": tokens / median_s,
                "step_seconds_median": median_s,
                "step_seconds": contest.seconds[name],
                "first_loss": contest.first_loss[name],
                "ratio": median_s / median,
            }
            for name, median_s in peers.items()
        }
        result["trial_seconds"] = contest.trial_seconds
        result["ratio"] = min(peers.values()) / median
        for name, median_s in peers.items():
            print(
                f"{tokens / median_s:,.0f} tokens/s, {median_s:.3f} s per step: {name}; "
                f"tokens per second, ours / its: {median_s / median:.2f}"
            )
        print("trial: " + ", ".join(f"{name} {trial_s:.3f} s" for name, trial_s in contest.trial_seconds.items()))
        print(f"ours / the best of transformers: {result['ratio']:.2f}")
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
