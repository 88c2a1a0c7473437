"""The expert MLPs of one MoE layer: ours against torch, Hugging Face transformers and Megatron-Core.

    python benchmarks/bench_experts.py --shape cpu-fine --threads 1 --json out.json
    python benchmarks/bench_experts.py --shape all-cpu --malloc both --save-as my-machine

Routing is given to all. Answers are checked against float64 before anything is timed; then competitors take turns in
this process, and medians count. "forward" is that of training: it keeps what the backward pass needs. "torch
grouped_mm" is the fastest of several ways to write sorted gather, torch._grouped_mm, SwiGLU, torch._grouped_mm and
weighted sum home, chosen for each phase by a trial in the same run. Ratios are the other's time over ours, and our
memory over the other's. Ceilings are measured in the same run.

TFLOP/s count 6 N F D forward and 18 N F D with backward (N pairs of token and expert), nothing for recomputation.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler would report each start on stderr

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from expert_case import OURS, PEERS, TARGET, Setting, measure_case
from expert_layer import HOUSE_MARGIN
from shapes import choose_shapes, load_shapes
from timing import RESULTS, machine

# Kept from the system instead of being given back after every call: what a training process may set for itself.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PHASES = ("forward", "forward_backward")
HEADLINE = ("ratio_forward", "ratio_forward_backward", "memory_ratio", "share_of_ceiling")


def main() -> None:
    chosen = parse(sys.argv[1:])
    if chosen.malloc == "both":
        report: dict[str, Any] = join([run_again(malloc) for malloc in ("default", "tuned")])
    elif chosen.malloc == "tuned" and any(os.environ.get(name) != value for name, value in TUNED_MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED_MALLOC})
    else:
        report = measure(chosen)
    keep(report, chosen)
    if report["left_out"]:
        sys.exit(f"left out (above): {', '.join(report['left_out'])}")


def keep(report: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Write where the options say."""
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    if chosen.save_as is not None:
        save(report, chosen.save_as)


def parse(arguments: list[str]) -> argparse.Namespace:
    shapes, small = load_shapes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME",
        help=f"repeatable; all-cpu ({', '.join(small)}), all-gpu (the others) or {', '.join(shapes)}",
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads; its own choice if left out")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11, help="turns per competitor")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"beside ours and torch's: some of {','.join(PEERS)}")
    parser.add_argument("--compile", action="store_true", help="also the torch pipeline under torch.compile")
    parser.add_argument(
        "--malloc",
        choices=("default", "tuned", "both"),
        default="default",
        help="tuned: starts itself anew with glibc told to keep freed memory; both: one after the other",
    )
    parser.add_argument(
        "--margin", type=float, default=HOUSE_MARGIN, help="largest error of ours over that of same-dtype torch"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further shape after so long")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    parser.add_argument(
        "--save-as", default=None, metavar="TAG", help="writes results/experts_<TAG>_<YYYYMM>.{md,json}"
    )
    chosen = parser.parse_args(arguments)
    chosen.peers = tuple(filter(None, chosen.peers.split(",")))
    for name in chosen.peers:
        if name not in PEERS:
            parser.error(f"--peers must be some of {', '.join(PEERS)}, got {name!r}")
    try:
        chosen.shapes = choose_shapes(chosen.shape or ["all-cpu"])
    except ValueError as wrong:
        parser.error(str(wrong))
    return chosen


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure every shape in this process, keeping the report after each; the first one's headline is the report's."""
    begun = time.perf_counter()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    setting = Setting(
        DTYPES[chosen.dtype], chosen.device, chosen.rounds, chosen.peers, chosen.malloc, chosen.compile, chosen.margin
    )
    cases: list[dict[str, object]] = []
    left_out: dict[str, str] = {}
    for shape in chosen.shapes:
        try:
            if cases and time.perf_counter() - begun > chosen.seconds:
                raise TimeoutError(f"{chosen.seconds:g} seconds are over")
            cases.append(measure_case(shape, setting))
        except (RuntimeError, ValueError, TimeoutError) as reason:  # memory that is full, a wrong answer of ours
            left_out[shape.name] = str(reason)
            print(f"{shape} is left out: {reason}", file=sys.stderr, flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        print(case_text(cases[-1]), flush=True)
        keep(report_of(machine(), cases, left_out), chosen)
    if not cases:
        sys.exit("no shape could be measured (above)")
    return report_of(machine(), cases, left_out)


def run_again(malloc: str) -> dict[str, Any]:
    """The same command under one allocator setting, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        arguments = [*without(sys.argv[1:], "--malloc", "--json", "--save-as"), "--malloc", malloc, "--json", str(path)]
        subprocess.run([sys.executable, sys.argv[0], *arguments], check=True)
        return json.loads(path.read_text())


def without(arguments: list[str], *options: str) -> list[str]:
    """``arguments`` less these options and their values, written with a space or an equals sign."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        elif argument.partition("=")[0] not in options:
            kept.append(argument)
    return kept


def join(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several; machine and headline are the first one's."""
    here = {**reports[0]["machine"], "command": " ".join(["python", *sys.argv])}
    return report_of(here, [case for report in reports for case in report["cases"]], {})


def report_of(where: dict[str, str], cases: list[dict[str, object]], left_out: dict[str, str]) -> dict[str, Any]:
    return {"machine": where, **{name: cases[0][name] for name in HEADLINE}, "cases": cases, "left_out": left_out}


def case_text(case: dict[str, Any]) -> str:
    """A Markdown section: one line per competitor."""
    shape, ceilings, kinds = case["shape"], case["ceilings"], case["torch_pipeline"]
    sizes = " ".join(f"{letter}={shape[letter]}" for letter in "TDFEK")
    head = (
        "competitor", "forward, ms", "x ours", "forward + backward, ms", "x ours", "TFLOP/s", "of ceiling", "peak, MB",
        "ours / it", "kept for backward, MB", "temporary, MB", "page faults",
    )  # fmt: skip
    isa = f", {case['isa']}" if case["isa"] else ""
    lines = [
        f"## {shape['name']} ({sizes}), {case['dtype']}{isa}, {case['threads']} thread(s), malloc {case['malloc']}",
        "",
        f"Ceilings: {1e3 * ceilings['tflops']:.0f} GFLOP/s ({_ceiling_text(ceilings)}), "
        f"{ceilings['copy_gbps']:.1f} GB/s copied (read + written).",
        f"torch grouped_mm forward: {kinds['forward']}; forward + backward: {kinds['forward_backward']}. "
        f"Our memory over that of its leanest way: {case['memory_ratio_to_leanest_pipeline']:.2f}.",
        *_bound_text(case),
        *_published_text(case),
        *(f"{name} is left out: {reason.splitlines()[0]}" for name, reason in case["skipped"].items()),
        "",
        "| " + " | ".join(head) + " |",
        "|---" + "|---:" * (len(head) - 1) + "|",
    ]
    lines += ["| " + " | ".join(_cells(name, one)) + " |" for name, one in case["competitors"].items()]
    return "\n".join([*lines, ""])


def _bound_text(case: dict[str, Any]) -> list[str]:
    """The products alone, as batched ones."""
    bound, own = case["batched_bound"], case["competitors"][OURS]
    ratios = [own[phase] / bound[phase] for phase in ("forward_ms", "forward_backward_ms")]
    return [
        f"Its products alone, batched, in equal groups: {bound['forward_ms']:.2f} ms forward, "
        f"{bound['forward_backward_ms']:.2f} ms with backward; ours takes {ratios[0]:.2f} and {ratios[1]:.2f} times as "
        "long."
    ]


def _published_text(case: dict[str, Any]) -> list[str]:
    """Our TFLOP/s beside those of SonicMoE's paper; nothing where it has none for the shape."""
    published, own = case["published_h100_tflops"], case["competitors"][OURS]
    if not published:
        return []
    parts = []
    for phase, figures in published.items():
        reached, share = own[f"tflops_{phase}"], own["share_of_published"][phase]
        ours = "too short to tell" if reached is None else f"ours {reached:.0f} ({share:.0%} of {TARGET}'s)"
        parts.append(f"{phase} {ours}, " + ", ".join(f"{name} {tflops}" for name, tflops in figures.items()))
    return ["TFLOP/s beside those published for one H100: " + "; ".join(parts) + "."]


def overview(cases: list[dict[str, Any]]) -> str:
    """One line per shape that has published figures."""
    head = ("shape", "forward, TFLOP/s", f"of {TARGET}'s H100", "backward, TFLOP/s", f"of {TARGET}'s H100",
            "forward, torch / ours", "forward + backward, torch / ours")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for case in cases:
        own, shares = case["competitors"][OURS], case["competitors"][OURS]["share_of_published"]
        cells = [case["shape"]["name"]]
        for phase in ("forward", "backward"):
            reached = own[f"tflops_{phase}"]
            cells += ["", ""] if reached is None else [f"{reached:.0f}", f"{shares[phase]:.0%}"]
        lines.append("| " + " | ".join([*cells, *(f"{case[f'ratio_{p}']:.2f}" for p in PHASES)]) + " |")
    return "\n".join([*lines, ""])


def _ceiling_text(ceilings: dict[str, Any]) -> str:
    native = ceilings["native_tflops"]
    parts = [f"torch matmul {1e3 * ceilings['matmul_tflops']:.0f}"]
    return ", ".join(parts if native is None else [*parts, f"own inner loop {1e3 * native:.0f}"])


def _cells(name: str, one: dict[str, Any]) -> list[str]:
    ours = name == OURS
    faults = one["page_faults"]
    return [
        name,
        _ms(one["forward_ms"]),
        "" if ours else f"{one['ratio_forward']:.2f}",
        _ms(one["forward_backward_ms"]),
        "" if ours else f"{one['ratio_forward_backward']:.2f}",
        f"{one['tflops_forward_backward']:.3f}",
        f"{one['share_of_ceiling']:.0%}",
        f"{one['peak_bytes'] / 1e6:.1f}",
        "" if ours else f"{one['memory_ratio']:.2f}",
        f"{one['saved_activation_bytes'] / 1e6:.1f}",
        f"{one['temporary_bytes'] / 1e6:.1f}",
        "" if faults is None else f"{faults}",
    ]


def _ms(ms: float) -> str:
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}"


def save(report: dict[str, Any], tag: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"experts_{tag}_{time.strftime('%Y%m')}"
    lines = ["# experts", "", *(f"- {key}: {value}" for key, value in report["machine"].items()), ""]
    published = [case for case in report["cases"] if case["published_h100_tflops"]]
    lines += [overview(published)] if published else []
    stem.with_suffix(".md").write_text("\n".join([*lines, *(case_text(case) for case in report["cases"])]))
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
