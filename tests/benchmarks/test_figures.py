"""What figures.py draws: bars in order, from zero, as long as the numbers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import figures
import matplotlib.pyplot as plt

MACHINE = {"hardware": "a machine", "torch": "2", "commit": "abc", "date": "2026-01-01"}


def competitor(forward_ms: float, both_ms: float) -> dict[str, Any]:
    return {
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "ratio_forward_backward": both_ms / 20,
        "memory_ratio": 0.5,
        "peak_bytes": 3_000_000,
        "saved_activation_bytes": 1_064_000,
    }


CASE = {
    "shape": {"name": "some", "T": 1000, "D": 16, "F": 8, "E": 4, "K": 2},
    "dtype": "float32",
    "threads": 1,
    "malloc": "default",
    "competitors": {"slow": competitor(10, 50), "moetrain": competitor(5, 20), "fast": competitor(8, 30)},
}


def test_bars_are_as_long_as_the_numbers_and_begin_at_zero() -> None:
    figure, ax = plt.subplots()
    figures.time_panel(ax, CASE)
    forward, backward = ax.containers
    assert [label.get_text() for label in ax.get_yticklabels()] == ["slow", "fast", "moetrain"]
    assert [bar.get_width() for bar in forward] == [10, 8, 5]
    assert [bar.get_x() + bar.get_width() for bar in backward] == [50, 30, 20]
    assert ax.get_xlim()[0] == 0
    plt.close(figure)


def test_memory_is_what_is_kept_beside_x_and_the_rest() -> None:
    figure, ax = plt.subplots()
    figures.memory_panel(ax, CASE)
    kept, rest = ax.containers
    assert [bar.get_width() for bar in kept] == pytest.approx([1.0] * 3)
    assert [bar.get_width() for bar in rest] == pytest.approx([2.0] * 3)
    plt.close(figure)


def test_each_setting_has_its_pictures(tmp_path: Path) -> None:
    report = {"machine": MACHINE, "cases": [CASE, {**CASE, "threads": 2}]}
    written = figures.draw(report, tmp_path, "experts")
    names = [f"experts_{what}_float32_{threads}t_default.png" for threads in (1, 2) for what in ("time", "memory")]
    assert [path.name for path in written] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_step_has_one_picture(tmp_path: Path) -> None:
    step = {"tokens_per_second": 200.0, "ranks": 2, "parameters": 7e6, "tokens_per_step": 64, "dtype": "float32"}
    report = {**step, "machine": MACHINE, "peers": {"other": {"tokens_per_second": 100.0}}}
    assert figures.draw(report, tmp_path, "step") == [tmp_path / "step.png"]
