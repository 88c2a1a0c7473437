"""Draws the figures of the README from what bench_experts.py and bench_step.py saved.

    python benchmarks/figures.py benchmarks/results/experts_<tag>_<YYYYMM>.json [--out FOLDER]

One picture of time and one of memory for each setting (type, threads, allocator) in the file, one panel for each shape;
of a step's file, one picture of tokens per second.
Axes start at 0 and are shared by nothing: panels differ in size, so numbers stand on the bars.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from timing import RESULTS

OURS, OTHERS = ("#1b6ca8", "#9cc4e0"), ("#5f6b73", "#c3cacf")  # dark, light
WIDTH, HEAD, FOOT = 9.0, 0.62, 0.28  # inches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON of bench_experts.py or bench_step.py")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    for path in chosen.results:
        for picture in draw(json.loads(path.read_text()), chosen.out, path.stem):
            print(picture)


def draw(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write all pictures of one report; returns where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    return draw_step(report, folder, stem) if "tokens_per_second" in report else draw_experts(report, folder, stem)


def draw_step(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Tokens per second of whole training steps."""
    peers = {name: one["tokens_per_second"] for name, one in report.get("peers", {}).items()}
    peers = dict(sorted(peers.items(), key=lambda peer: peer[1]))
    speeds = {**peers, "moetrain": report["tokens_per_second"]}
    height = HEAD + FOOT + 0.5 + 0.34 * len(speeds)
    figure, ax = plt.subplots(figsize=(WIDTH, height))
    stacked(ax, list(speeds), [list(speeds.values())])
    notes = [f"{speed:,.0f}" + ("" if name == "moetrain" else f"   ours: {speeds['moetrain'] / speed:.2f}x")
             for name, speed in speeds.items()]  # fmt: skip
    label_bars(ax, list(speeds.values()), notes, "tokens per second, higher is better")
    figure.tight_layout(rect=(0, FOOT / height, 1, 1 - HEAD / height))
    ranks = f"{report['ranks']} rank{'' if report['ranks'] == 1 else 's'}"
    about = f"{report['parameters'] / 1e6:.1f} M parameters, {report['tokens_per_step']} tokens per step, {ranks}"
    write_texts(figure, "A whole training step", f"{about}, moetrain in {report['dtype']}", report["machine"])
    path = folder / f"{stem}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return [path]


def draw_experts(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Time and memory for each setting."""
    settings: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for case in report["cases"]:
        settings.setdefault((case["dtype"], case["threads"], case["malloc"]), []).append(case)
    written = []
    for (dtype, threads, malloc), cases in settings.items():
        setting = f"{dtype}, {threads} thread{'' if threads == 1 else 's'}, {malloc} allocator settings"
        for picture in PICTURES:
            figure = panels(cases, picture)
            write_texts(figure, picture.title, setting, report["machine"])
            write_legend(figure, picture.parts)
            path = folder / f"{stem}_{picture.name}_{dtype}_{threads}t_{malloc}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            written.append(path)
    return written


def panels(cases: Sequence[dict[str, Any]], picture: "Picture") -> Figure:
    bars = max(len(case["competitors"]) for case in cases)
    height = HEAD + FOOT + len(cases) * (0.85 + 0.26 * bars)
    figure, axes = plt.subplots(len(cases), 1, figsize=(WIDTH, height), squeeze=False)
    for ax, case in zip(axes[:, 0], cases, strict=True):
        picture.panel(ax, case)
    figure.tight_layout(rect=(0, FOOT / height, 1, 1 - HEAD / height), h_pad=1.4)
    return figure


def write_texts(figure: Figure, title: str, setting: str, where: dict[str, str]) -> None:
    """Title, and where the figures come from."""
    height = figure.get_figheight()
    figure.text(0.1 / WIDTH, 1 - 0.1 / height, title, fontsize=12, fontweight="bold", va="top")
    figure.text(0.1 / WIDTH, 1 - 0.36 / height, setting, fontsize=9, color="#444444", va="top")
    origin = (
        f"{where['hardware']}, torch {where['torch']}, commit {where['commit']}, {where['date']}. "
        "Medians of competitors that took turns in one process."
    )
    figure.text(0.1 / WIDTH, 0.08 / height, origin, fontsize=7.5, color="#555555", va="bottom")


def write_legend(figure: Figure, parts: Sequence[str]) -> None:
    """What the shades mean: the same for ours and for others."""
    shades = [Patch(facecolor=colour, label=label) for colour, label in zip(OTHERS, parts, strict=True)]
    corner = (1 - 0.05 / WIDTH, 1 - 0.3 / figure.get_figheight())
    figure.legend(handles=shades, loc="upper right", bbox_to_anchor=corner, ncols=2, fontsize=8.5, frameon=False)


def time_panel(ax: Axes, case: dict[str, Any]) -> None:
    """Forward and the rest of each step, and how many times longer than ours."""
    names = ranked(case, "forward_backward_ms")
    ones = [case["competitors"][name] for name in names]
    forward = [one["forward_ms"] for one in ones]
    both = [one["forward_backward_ms"] for one in ones]
    # Forward alone and both together are timed apart; what is left of both is drawn as backward.
    stacked(ax, names, [forward, [max(0.0, b - f) for f, b in zip(forward, both, strict=True)]])
    notes = [
        f"{b:.0f} ms" + ("" if name == "moetrain" else f"   {one['ratio_forward_backward']:.2f}x ours")
        for name, one, b in zip(names, ones, both, strict=True)
    ]
    finish(ax, case, both, notes, "milliseconds")


def memory_panel(ax: Axes, case: dict[str, Any]) -> None:
    """What is kept for the backward pass, and the rest of the peak."""
    names = ranked(case, "peak_bytes")
    ones = [case["competitors"][name] for name in names]
    x_bytes = case["shape"]["T"] * case["shape"]["D"] * (2 if case["dtype"] == "bfloat16" else 4)
    peak = [one["peak_bytes"] / 1e6 for one in ones]
    kept = [max(0, one["saved_activation_bytes"] - x_bytes) / 1e6 for one in ones]
    kept = [min(k, p) for k, p in zip(kept, peak, strict=True)]
    rest = [p - k for p, k in zip(peak, kept, strict=True)]
    stacked(ax, names, [kept, rest])
    notes = [
        f"{p:.0f} MB" + ("" if name == "moetrain" else f"   {1 / one['memory_ratio']:.2f}x ours")
        for name, one, p in zip(names, ones, peak, strict=True)
    ]
    finish(ax, case, peak, notes, "megabytes beyond inputs and weights")


def ranked(case: dict[str, Any], key: str) -> list[str]:
    """Names, ours on top, then the others from best to worst (matplotlib draws the first at the bottom)."""
    others = sorted(
        (name for name in case["competitors"] if name != "moetrain"), key=lambda n: case["competitors"][n][key]
    )
    return [*reversed(others), "moetrain"]


def stacked(ax: Axes, names: Sequence[str], parts: Sequence[Sequence[float]]) -> None:
    left = [0.0] * len(names)
    for shade, part in enumerate(parts):
        colours = [(OURS if name.startswith("moetrain") else OTHERS)[shade] for name in names]
        ax.barh(range(len(names)), part, left=left, color=colours, height=0.72)
        left = [before + more for before, more in zip(left, part, strict=True)]
    ax.set_yticks(range(len(names)), names, fontsize=9)


def finish(ax: Axes, case: dict[str, Any], ends: Sequence[float], notes: Sequence[str], unit: str) -> None:
    label_bars(ax, ends, notes, f"{unit}, lower is better")
    shape = case["shape"]
    sizes = f"{shape['T']} tokens, width {shape['D']}, {shape['E']} experts of width {shape['F']}, top-{shape['K']}"
    ax.set_title(f"{shape['name']}: {sizes}", loc="left", fontsize=10)


def label_bars(ax: Axes, ends: Sequence[float], notes: Sequence[str], unit: str) -> None:
    for place, (end, note) in enumerate(zip(ends, notes, strict=True)):
        ax.annotate(note, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_xlim(0, 1.22 * max(ends))
    ax.set_xlabel(unit, fontsize=8.5)
    ax.tick_params(axis="x", labelsize=8)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.margins(y=0.02)


@dataclass(frozen=True, slots=True)
class Picture:
    """One kind of picture: its panel, and what dark and light parts of a bar are."""

    name: str
    title: str
    parts: tuple[str, str]
    panel: Callable[[Axes, dict[str, Any]], None]


PICTURES = (
    Picture("time", "Experts of one MoE layer: time of a training step", ("forward", "backward"), time_panel),
    Picture(
        "memory",
        "Experts of one MoE layer: peak memory of a training step",
        ("kept for the backward pass (beside x)", "temporary, and results"),
        memory_panel,
    ),
)


if __name__ == "__main__":
    main()
