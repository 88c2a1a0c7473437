"""Measures all competitors on one shape: values first, then time in turns, then memory. See bench_experts.py."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ceilings import Ceilings, higher, measure_batched_bound, measure_ceilings
from expert_layer import HOUSE_MARGIN, PEER_MARGIN, Competitor, Layer, check, definition, largest_errors, make_layer
from expert_peers import PIPELINES, Pipeline, compiled, on_path, ours, padded_bmm, sorted_loop, torch_pipeline, unfused
from foreign_experts import hugging_face, megatron_sequential
from kernel_peers import liger, quack, scattermoe, sonicmoe
from peak_memory import page_faults, peak_bytes, peak_resident_bytes, saved_bytes
from shapes import Shape, published_tflops
from timing import Row, compare

from moetrain import _C

OURS, PIPELINE = "moetrain", "torch grouped_mm"
_TRIAL_ROUNDS = 3

PEERS: dict[str, Callable[[Layer], Competitor]] = {
    "recompute": lambda layer: ours(layer, recompute_h=True),
    "unfused": unfused,
    "loop": sorted_loop,
    "bmm": padded_bmm,
    "hf-eager": lambda layer: hugging_face(layer, "eager"),
    "hf-grouped": lambda layer: hugging_face(layer, "grouped_mm"),
    "megatron": megatron_sequential,
    "path-sm80": lambda layer: on_path(layer, "sm80"),
    "path-grouped_mm": lambda layer: on_path(layer, "grouped_mm"),
    "liger": liger,
    "scattermoe": scattermoe,
    "sonicmoe": sonicmoe,
    "quack": quack,
}
OWN_PEERS = ("recompute", "unfused")
TARGET = "sonicmoe"  # whose published figures ours are held against


@dataclass(frozen=True, slots=True)
class Setting:
    """What a case is measured under."""

    dtype: torch.dtype
    device: str
    rounds: int
    peers: tuple[str, ...]
    malloc: str
    with_compile: bool = False
    margin: float = HOUSE_MARGIN


@dataclass(frozen=True, slots=True, eq=False)
class Contest:
    """The competitors of one phase each; the torch pipeline that is fastest in one may not be so in the other."""

    forward: dict[str, Competitor]
    forward_backward: dict[str, Competitor]
    pipeline: dict[str, str]  # which was chosen for each phase
    tried: dict[str, dict[str, float]]  # all of them
    errors: dict[str, dict[str, float]]
    plain: dict[str, float]  # errors of same-dtype torch
    skipped: dict[str, str]


def measure_case(shape: Shape, setting: Setting) -> dict[str, Any]:
    """Everything about one shape, ready for JSON."""
    layer = make_layer(shape, setting.dtype, setting.device)
    before = measure_ceilings(setting.dtype, setting.device)
    contest = assemble(layer, setting)
    forward = compare(str(shape), {name: one.run for name, one in contest.forward.items()}, rounds=setting.rounds)
    both_calls = {name: _both(one, layer) for name, one in contest.forward_backward.items()}
    both = compare(str(shape), both_calls, rounds=setting.rounds)
    memory = {name: _memory(one, layer, setting.device) for name, one in contest.forward_backward.items()}
    ceilings = higher(before, measure_ceilings(setting.dtype, setting.device))
    bound = measure_batched_bound(shape, setting.dtype, setting.device)
    leanest = min(kind["peak_bytes"] for kind in contest.tried.values())
    competitors = summarise(shape, forward, both, memory, ceilings)
    for name, errors in contest.errors.items():
        competitors[name]["errors"] = errors
    return {
        "shape": asdict(shape),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "malloc": setting.malloc,
        "isa": _C.cpu_isa() if setting.device == "cpu" else None,
        **headline(competitors),
        "memory_ratio_to_leanest_pipeline": competitors[OURS]["peak_bytes"] / leanest,
        "ceilings": {**asdict(ceilings), "tflops": ceilings.tflops},
        "batched_bound": asdict(bound),
        "published_h100_tflops": published_tflops(shape.name),
        "torch_pipeline": {**contest.pipeline, "tried": contest.tried},
        "competitors": competitors,
        "errors_of_plain_torch": contest.plain,
        "margin": setting.margin,
        "skipped": contest.skipped,
    }


def assemble(layer: Layer, setting: Setting) -> Contest:
    """All competitors that exist here, each of which has given the right answer."""
    exact = definition(layer, torch.promote_types(setting.dtype, torch.float64))
    plain = largest_errors(definition(layer, setting.dtype), exact)
    fused = ours(layer)
    errors = {OURS: check(fused, layer, exact, plain, margin=setting.margin)}
    forward_kind, both_kind, tried = fastest_pipelines(layer, exact, plain)
    contest = Contest(
        {OURS: fused, PIPELINE: torch_pipeline(layer, forward_kind)},
        {OURS: fused, PIPELINE: torch_pipeline(layer, both_kind)},
        {"forward": str(forward_kind), "forward_backward": str(both_kind)},
        tried,
        errors,
        plain,
        {},
    )
    errors[PIPELINE] = check(contest.forward_backward[PIPELINE], layer, exact, plain)
    for name in setting.peers:
        margin = setting.margin if name == "recompute" else PEER_MARGIN
        try:
            peer = PEERS[name](layer)
            errors[peer.name] = check(peer, layer, exact, plain, margin=margin)
        except Exception as reason:  # whatever another library raises, where it does not run, costs its own row alone
            if name in OWN_PEERS:
                raise
            contest.skipped[name] = f"{type(reason).__name__}: {reason}"
            if layer.x_TD.is_cuda:
                torch.cuda.empty_cache()
            sys.stderr.write(f"{name} is left out: {contest.skipped[name]}\n")
            continue
        contest.forward[peer.name] = contest.forward_backward[peer.name] = peer
    if setting.with_compile:
        peer = compiled(contest.forward_backward[PIPELINE])
        errors[peer.name] = check(peer, layer, exact, plain)
        contest.forward[peer.name] = contest.forward_backward[peer.name] = peer
    return contest


def fastest_pipelines(
    layer: Layer, exact: dict[str, torch.Tensor], plain: dict[str, float]
) -> tuple[Pipeline, Pipeline, dict[str, dict[str, float]]]:
    """Which of ``PIPELINES`` is fastest forward, which forward and backward, and what each took in the trial."""
    built: dict[Pipeline, Competitor] = {}
    for kind in PIPELINES:
        try:
            pipeline = torch_pipeline(layer, kind)
            check(pipeline, layer, exact, plain)
        except (RuntimeError, ValueError) as reason:  # one way of several; not every device has all its operators
            sys.stderr.write(f"torch grouped_mm, {kind}, is left out: {type(reason).__name__}: {reason}\n")
            continue
        built[kind] = pipeline
    if not built:
        raise ValueError(f"{layer.shape}: no torch pipeline gave the right answer (above)")
    forward = compare("", {str(kind): one.run for kind, one in built.items()}, rounds=_TRIAL_ROUNDS)
    both = compare("", {str(kind): _both(one, layer) for kind, one in built.items()}, rounds=_TRIAL_ROUNDS)
    device = layer.x_TD.device.type
    tried = {
        str(kind): {
            "forward_ms": forward.median_ms[str(kind)],
            "forward_backward_ms": both.median_ms[str(kind)],
            "peak_bytes": peak_bytes(_both(one, layer), device),
        }
        for kind, one in built.items()
    }
    # The least time, for a competitor must not be chosen by a neighbour's noise.
    forward_kind = min(built, key=lambda kind: forward.best_ms[str(kind)])
    both_kind = min(built, key=lambda kind: both.best_ms[str(kind)])
    return forward_kind, both_kind, tried


def summarise(
    shape: Shape, forward: Row, both: Row, memory: Mapping[str, dict[str, int | None]], ceilings: Ceilings
) -> dict[str, dict[str, Any]]:
    """Per competitor: its own figures, and the three ratios, which are how much better ours is than it."""
    found: dict[str, dict[str, Any]] = {}
    for name in both.median_ms:
        forward_tflops = shape.forward_flop / forward.median_ms[name] / 1e9
        both_tflops = shape.forward_backward_flop / both.median_ms[name] / 1e9
        # Forward alone and both together are timed apart; what is left of both is the backward pass.
        backward_ms = both.median_ms[name] - forward.median_ms[name]
        backward_tflops = shape.backward_flop / backward_ms / 1e9 if backward_ms > 0 else None
        found[name] = {
            "forward_ms": forward.median_ms[name],
            "forward_backward_ms": both.median_ms[name],
            "forward_best_ms": forward.best_ms[name],
            "forward_backward_best_ms": both.best_ms[name],
            "tflops_forward": forward_tflops,
            "tflops_backward": backward_tflops,
            "share_of_published": _shares_of_published(shape, forward_tflops, backward_tflops),
            "tflops_forward_backward": both_tflops,
            "share_of_ceiling_forward": forward_tflops / ceilings.tflops,
            "share_of_ceiling": both_tflops / ceilings.tflops,
            "ratio_forward": forward.median_ms[name] / forward.median_ms[OURS],
            "ratio_forward_backward": both.median_ms[name] / both.median_ms[OURS],
            "memory_ratio": _ratio(memory[OURS]["peak_bytes"], memory[name]["peak_bytes"]),
            **memory[name],
        }
    return found


def _shares_of_published(shape: Shape, forward: float, backward: float | None) -> dict[str, float | None]:
    """TFLOP/s over those published of ``TARGET``; empty where there are none."""
    published = published_tflops(shape.name)
    reached = {"forward": forward, "backward": backward}
    return {phase: _ratio(reached[phase], figures[TARGET]) for phase, figures in published.items()}


def headline(competitors: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Ours against the best torch pipeline."""
    against = competitors[PIPELINE]
    return {
        "ratio_forward": against["ratio_forward"],
        "ratio_forward_backward": against["ratio_forward_backward"],
        "memory_ratio": against["memory_ratio"],
        "share_of_ceiling": competitors[OURS]["share_of_ceiling"],
        "share_of_ceiling_forward": competitors[OURS]["share_of_ceiling_forward"],
    }


def _memory(competitor: Competitor, layer: Layer, device: str) -> dict[str, int | None]:
    both = _both(competitor, layer)
    saved = saved_bytes(
        competitor.run, weights=competitor.leaves[2:], metadata=(layer.weight_N, layer.weight_TK, competitor.leaves[1])
    )
    peak = peak_bytes(both, device)
    on_cpu = device == "cpu"
    return {
        "peak_bytes": peak,
        "saved_activation_bytes": saved.activation_bytes,
        "saved_metadata_bytes": saved.metadata_bytes,
        # What is neither kept for backward nor a result: y and the gradients are as large as x and the leaves.
        "temporary_bytes": max(0, peak - _new_saved(saved.activation_bytes, layer) - _result_bytes(competitor, layer)),
        "peak_resident_bytes": peak_resident_bytes(both) if on_cpu else None,
        "page_faults": page_faults(both) if on_cpu else None,
    }


def _new_saved(activation_bytes: int, layer: Layer) -> int:
    """Saved bytes without x, which was there before."""
    return max(0, activation_bytes - layer.x_TD.nbytes)


def _result_bytes(competitor: Competitor, layer: Layer) -> int:
    return layer.x_TD.nbytes + sum(leaf.nbytes for leaf in competitor.leaves)


def _both(competitor: Competitor, layer: Layer) -> Callable[[], object]:
    return lambda: competitor.forward_backward(layer.dy_TD)


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
