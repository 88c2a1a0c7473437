"""Where the time of a training step goes. See bench_step.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from step_contest import our_step
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.moe import layer as moe_layer
from moetrain.moe.experts import run_experts
from moetrain.train.engine import Engine

EXPERTS_RANGE = "moetrain: experts"
BUCKETS = {
    "experts": (EXPERTS_RANGE, "moetrain::expert_mlp", "moetrain::grouped_gemm"),
    "routing": (
        "moetrain::route",
        "moetrain::select_experts",
        "moetrain::group_pairs",
        "moetrain::round_pairs",
        "moetrain::offer_pairs",
    ),
    "attention": (
        "moetrain::causal_attention",
        "moetrain::attend",
        "moetrain::rotate",
        "aten::_scaled_dot_product",
        "aten::_flash",
        "aten::scaled_dot",
    ),
    "norm": ("moetrain::rms_norm",),
    "rows": ("moetrain::",),
    "communication": (
        "_AllToAllRows",  # what older checkouts call it, for compare_checkouts.py
        "_Depart",
        "_Arrive",
        "_StartExchange",
        "_FinishExchange",
        "FSDP::",
        "c10d",
        "_c10d",
        "gloo:",
        "nccl:",
        "record_param_comms",
    ),
    "dense matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear"),
    "optimizer": ("Optimizer.", "aten::_foreach"),
}
REST = "rest"


def profiled_split(engine: Engine) -> dict[str, float]:
    """Share of each bucket in the self time of all operators of one step. Collective."""
    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _experts_marked(), profile(activities=activities, acc_events=True) as trace:
        our_step(engine)
    events = trace.events()
    experts = expert_sequence_numbers(events)
    total: dict[str, float] = dict.fromkeys([*BUCKETS, REST], 0.0)
    for event in events:
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total[bucket(event, experts)] += spent
    everything = sum(total.values())
    return {name: spent / everything for name, spent in total.items()}


def expert_sequence_numbers(events: Any) -> set[int]:
    """Autograd's numbers of what ran inside the experts: the same numbers name their backward functions."""
    return {event.sequence_nr for event in events if event.sequence_nr >= 0 and _is_inside_experts(event)}


def bucket(event: Any, experts: set[int]) -> str:
    """The bucket of the outermost operator around ``event`` that has one: a matmul inside an expert is the expert's."""
    found = REST
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in experts:
            return "experts"
        found = next((name for name, prefixes in BUCKETS.items() if event.name.startswith(prefixes)), found)
        event = event.cpu_parent
    return found


def _is_inside_experts(event: Any) -> bool:
    while event is not None:
        if event.name == EXPERTS_RANGE:
            return True
        event = event.cpu_parent
    return False


@contextmanager
def _experts_marked() -> Iterator[None]:
    """Give what runs between dispatch and combine a name in the trace."""

    def marked(*args: Any, **kwargs: Any) -> torch.Tensor:
        with record_function(EXPERTS_RANGE):
            return run_experts(*args, **kwargs)

    with mock.patch.object(moe_layer, "run_experts", marked):
        yield
