"""A training step of two versions of moetrain in turns, each split by this version's profile: did experts get faster?

    git worktree add ../older ff6ca7e && (cd ../older && python setup.py build_ext --inplace)
    python benchmarks/compare_checkouts.py ../older . --json out.json -- --preset quickstart --mesh.ep 2

    python benchmarks/compare_checkouts.py ../older . --ops --rounds 7 --json out.json

Both must have been built in place, for the same instruction sets. What follows ``--`` goes to both, on 2 ranks and
the same random rows. "dispatch" is routing, moving rows and communication together. With ``--ops`` single operators
are timed instead, on one thread. The two swap places from round to round. Ratios are of medians, older over newer:
above 1 is faster.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report each start on stderr

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from timing import machine

STEPS = 5


def main() -> None:
    if "LOCAL_RANK" in os.environ:
        measure(Path(sys.argv[1]), sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path)
    parser.add_argument("newer", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each, in turns")
    parser.add_argument("--ops", action="store_true", help="single operators instead of a step")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    mine, options = sys.argv[1:], []
    if "--" in mine:
        mine, options = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    chosen = parser.parse_args(mine)
    folders = {"older": chosen.older.resolve(), "newer": chosen.newer.resolve()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for number in range(chosen.rounds):
        for name in sorted(folders, reverse=number % 2 == 0):
            runs[name].append(ops_of(folders[name]) if chosen.ops else run_of(folders[name], options))
            print(name, "  ".join(f"{part} {1e3 * seconds:.3g} ms" for part, seconds in runs[name][-1].items()))
    report = {"machine": machine(), "runs": runs, **summary(runs)}
    print("  ".join(f"{name} {value:.3f}" for name, value in summary(runs).items()))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Medians of each part, older over newer; parts too short to be in a profile are left out."""
    median = {name: {part: statistics.median(run[part] for run in of) for part in of[0]} for name, of in runs.items()}
    return {
        f"{part.replace(' ', '_')}_ratio": seconds / median["newer"][part]
        for part, seconds in median["older"].items()
        if seconds > 0 and median["newer"][part] > 0
    }


def ops_of(folder: Path) -> dict[str, float]:
    """Seconds of operators in a process that imports moetrain from ``folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "seconds.json"
        script = Path(__file__).with_name("checkout_ops.py")
        # As in training, freed memory stays: mapping it anew, page by page, would hide what the operator takes.
        kept = {f"MALLOC_{name}_": str(1 << 30) for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")}
        environment = {**os.environ, **kept, "PYTHONPATH": str(folder)}
        subprocess.run([sys.executable, script, path], env=environment, check=True)
        return json.loads(path.read_text())


def run_of(folder: Path, options: list[str]) -> dict[str, float]:
    """Seconds of a step and of its parts, from two ranks that import moetrain from ``folder``."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "seconds.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "PYTHONPATH": str(folder), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        subprocess.run([*launch, __file__, str(path), *options], env=environment, cwd=folder, check=True)
        return json.loads(path.read_text())


def measure(path: Path, options: list[str]) -> None:
    """One rank: five steps, then three profiled ones; rank 0 writes the seconds to ``path``."""
    from step_contest import our_step, timed
    from step_profile import profiled_split

    from moetrain.config.load import load_run
    from moetrain.mesh.folded_mesh import FoldedMesh
    from moetrain.mesh.groups import MeshGroups
    from moetrain.train import world as ranks
    from moetrain.train.engine import Engine

    run, world = load_run(options, default_preset="quickstart"), ranks.World.from_environment()
    device = world.device(run.train.device)
    ranks.set_threads(run.train, world)
    if hasattr(ranks, "keep_freed_memory"):  # as each version trains
        ranks.keep_freed_memory(device)
    with ranks.process_group(world, device, run.train.timeout_s):
        mesh = FoldedMesh.from_config(run.mesh, world.size)
        groups = MeshGroups.create(mesh, device_type=device.type, timeout=timedelta(seconds=run.train.timeout_s))
        engine = Engine(run, groups, device)
        our_step(engine)
        our_step(engine)
        step = statistics.median(timed(lambda: our_step(engine)) for _ in range(STEPS))
        splits = [profiled_split(engine) for _ in range(3)]
        groups.close()
    if world.rank == 0:
        parts = {name: step * statistics.median(split[name] for split in splits) for name in splits[0]}
        dispatch = sum(parts.get(name, 0.0) for name in ("routing", "rows", "communication"))
        path.write_text(json.dumps({"step": step, **parts, "dispatch": dispatch}))


if __name__ == "__main__":
    main()
