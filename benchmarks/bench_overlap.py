"""What a training step gains where rows travel while something is computed.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_overlap.py --mesh.ep 2 --json out.json

The same step, in turns: "waits" begins nothing before the last rows have arrived; "overlaps" computes the shared expert
meanwhile; "2 pieces" and "4 pieces" also let experts work on one part of the tokens while another travels, at the price
of smaller products and of one more sum of weight gradients for each piece. All begin with the same loss, which is
checked. Ratios are to "waits": above 1 is faster. Where ranks share cores with the transport, as on one CPU machine,
there is little to gain: what travels is copied by the very cores that compute.

Options beside those below are moetrain's own; two shared experts are added where the preset has none.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from step_contest import our_step
from timing import Row, compare, machine

from moetrain.config import RunConfig
from moetrain.config.load import load_run
from moetrain.mesh.collectives import PendingRows, start_all_to_all_rows
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.moe.dispatch import groups as dispatch_groups
from moetrain.train.engine import Engine
from moetrain.train.world import World, keep_freed_memory, process_group, set_threads

PIECES = {"waits": 1, "overlaps": 1, "2 pieces": 2, "4 pieces": 4}


@contextmanager
def waiting_at_once() -> Iterator[None]:
    """Rows arrive before anything else begins, in both passes."""

    def start(*args: Any, **options: Any) -> PendingRows:
        return PendingRows(start_all_to_all_rows(*args, **options).wait(), None)

    with mock.patch.object(dispatch_groups, "start_all_to_all_rows", start):
        yield


def race(run: RunConfig, groups: MeshGroups, device: str, rounds: int) -> Row:
    """Median seconds of a step, the same number on every rank's clock within a turn. Collective."""
    engines = {
        name: Engine(replace(run, dispatch=replace(run.dispatch, pieces=pieces)), groups, device)
        for name, pieces in PIECES.items()
    }

    def step(name: str) -> float:
        if name != "waits":
            return our_step(engines[name])
        with waiting_at_once():
            return our_step(engines[name])

    losses = {name: step(name) for name in PIECES}
    for name, loss in losses.items():
        if not math.isclose(loss, losses["waits"], rel_tol=1e-2):
            raise ValueError(f"{name}: the first loss must be that of 'waits', {losses['waits']}, got {loss}")
    return compare("step", {name: partial(step, name) for name in PIECES}, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each way")
    chosen, rest = parser.parse_known_args(sys.argv[1:])
    run = load_run(rest, default_preset="quickstart")
    if run.moe.shared_hidden == 0:
        run = replace(run, moe=replace(run.moe, num_shared_experts=2))
    world = World.from_environment()
    mesh = FoldedMesh.from_config(run.mesh, world.size)
    device = world.device(run.train.device)
    set_threads(run.train, world)
    keep_freed_memory(device)
    with process_group(world, device, run.train.timeout_s):
        groups = MeshGroups.create(mesh, device_type=device.type, timeout=timedelta(seconds=run.train.timeout_s))
        row = race(run, groups, str(device), chosen.rounds)
        dist.barrier()
        groups.close()
    if world.rank != 0:
        return
    speed = {name: row.median_ms["waits"] / ms for name, ms in row.median_ms.items()}
    for name, ms in row.median_ms.items():
        print(f"{name}: {ms:.0f} ms a step, {speed[name]:.3f} times as fast as waiting")
    if chosen.json is not None:
        found = {"machine": machine(), "median_ms": row.median_ms, "best_ms": row.best_ms, "speed": speed}
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
