"""Tokens per second of a whole training step, and where the time goes.

    python benchmarks/bench_step.py --preset quickstart --json out.json
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_step.py --preset quickstart --mesh.ep 2

Tokens are random, so routing is that of an untrained router. The first step's loss must be log(vocabulary) before
anything is timed. The split is self time of operators in one profiled step of rank 0 (device time on a GPU); waiting
for other ranks counts as communication, elementwise work inside experts as rest.
"""

import json
import math
import platform
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moetrain.config import RunConfig
from moetrain.config.load import load_run
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.data_planner import plan_data
from moetrain.sequence.plan import Sequence
from moetrain.train.engine import Engine
from moetrain.train.world import World, process_group, set_threads

WARM_UP, TIMED = 2, 5
BUCKETS = {
    "experts": ("moetrain::grouped_gemm",),
    "routing and rows": ("moetrain::",),
    "communication": ("_AllToAllRows", "FSDP::", "c10d", "_c10d", "gloo:", "nccl:", "record_param_comms"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::scaled_dot"),
    "dense matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
    "optimizer": ("Optimizer.", "aten::_foreach"),
}


def main() -> None:
    arguments, json_path = split_json(sys.argv[1:])
    run = load_run(arguments, default_preset="quickstart")
    world = World.from_environment()
    mesh = FoldedMesh.from_config(run.mesh, world.size)
    device = world.device(run.train.device)
    threads = set_threads(run.train, world)
    with process_group(world, device, run.train.timeout_s):
        groups = MeshGroups.create(mesh, device_type=device.type, timeout=timedelta(seconds=run.train.timeout_s))
        engine = Engine(run, groups, device)
        first_loss = step(engine)
        expected = math.log(run.model.vocab_size)
        assert abs(first_loss - expected) < 0.1 * expected, f"the first loss is {first_loss}, not about {expected}"
        for _ in range(WARM_UP - 1):
            step(engine)
        seconds = [timed(engine) for _ in range(TIMED)]
        split = profiled(engine)
        groups.close()
    if world.rank == 0:
        report(run, world, device, threads, seconds, split, first_loss, json_path)


def step(engine: Engine) -> float:
    """One step on random rows, which are the same on every number of ranks."""
    data, vocab = engine.run.data, engine.run.model.vocab_size
    sequences = [Sequence(row, data.seq_len, data.seq_len) for row in range(data.global_batch)]
    plan = plan_data(sequences, engine.groups.size("data"), data.micro_batch)
    rank = engine.groups.group_rank("data")
    return engine.step(
        plan, [batch_of(plan.item_at(rank, idx), data.seq_len, vocab) for idx in range(plan.num_rounds)]
    ).loss


def batch_of(item, seq_len: int, vocab: int) -> PackedBatch:
    if item is None:
        return PackedBatch.empty(seq_len)
    rows = []
    for row in item.sequence_ids:
        rows.append(torch.randint(0, vocab, (seq_len + 1,), generator=torch.Generator().manual_seed(row)))
    token_id_BS = torch.stack(rows)
    position_BS = torch.arange(seq_len).expand(len(rows), -1).contiguous()
    return PackedBatch(
        token_id_BS[:, :-1].contiguous(),
        token_id_BS[:, 1:].contiguous(),
        position_BS,
        torch.zeros_like(position_BS),
        torch.tensor(item.sequence_ids),
    )


def timed(engine: Engine) -> float:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step(engine)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def profiled(engine: Engine) -> dict[str, float]:
    """Share of each bucket in the self time of all operators of one step."""
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as trace:
        step(engine)
    total: dict[str, float] = dict.fromkeys([*BUCKETS, "rest"], 0.0)
    for event in trace.events():
        total[bucket(event)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    everything = sum(total.values())
    return {name: spent / everything for name, spent in total.items()}


def bucket(event) -> str:
    """The bucket of the outermost operator around ``event`` that has one: a matmul inside an expert is the expert's."""
    found = "rest"
    while event is not None:
        found = next((name for name, prefixes in BUCKETS.items() if event.name.startswith(prefixes)), found)
        event = event.cpu_parent
    return found


def report(
    run: RunConfig,
    world: World,
    device: torch.device,
    threads: int,
    seconds: list[float],
    split: dict[str, float],
    first_loss: float,
    json_path: Path | None,
) -> None:
    tokens = run.data.global_batch * run.data.seq_len
    median = statistics.median(seconds)
    result = {
        "tokens_per_second": tokens / median,
        "step_seconds_median": median,
        "step_seconds": seconds,
        "tokens_per_step": tokens,
        "split": split,
        "first_loss": first_loss,
        "ranks": world.size,
        "threads_per_rank": threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "command": " ".join(sys.argv),
    }
    print(f"{tokens / median:,.0f} tokens/s, {median:.3f} s per step of {tokens} tokens on {world.size} rank(s)")
    print("  ".join(f"{name} {share:.0%}" for name, share in split.items()))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def split_json(arguments: list[str]) -> tuple[list[str], Path | None]:
    """Take ``--json PATH`` out of the options; the rest is moetrain's."""
    if "--json" not in arguments:
        return arguments, None
    at = arguments.index("--json")
    return arguments[:at] + arguments[at + 2 :], Path(arguments[at + 1])


if __name__ == "__main__":
    main()
