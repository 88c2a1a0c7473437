"""Traces of loads: files that come back as they were written, and files that are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.placement.trace import Trace, TraceFacts, is_runs_piece, piece_path, pieces

FACTS = TraceFacts(groups_per_node=2, planner="static", top_k=2, width=8, expert_width=16, gated=True)


def some_trace(num_steps: int = 5, first_step: int = 3, *, num_experts: int = 6, sources: int = 4) -> Trace:
    """Every count says where it is."""
    count = np.arange(num_steps * 2 * sources * num_experts, dtype=np.int32) + 1000 * first_step
    return Trace(count.reshape(num_steps, 2, sources, num_experts), first_step, (1, 3), FACTS)


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    trace = replace(some_trace(), facts=replace(FACTS, costs={"pair_s": 0.5}))
    trace.save(tmp_path / "x.npz")
    found = Trace.load(tmp_path / "x.npz", num_experts=6)
    assert np.array_equal(found.count, trace.count)
    assert (found.first_step, found.last_step, found.layers, found.facts) == (3, 7, (1, 3), trace.facts)
    assert (found.num_steps, found.num_sources, found.num_experts) == (5, 4, 6)


@pytest.mark.parametrize("inside", ["", "trace"])
def test_pieces_of_a_folder_are_one_trace(inside: str, tmp_path: Path) -> None:
    whole = some_trace(9, 95)
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    for first, last in ((95, 96), (97, 99), (100, 103)):
        part = Trace(whole.count[first - 95 : last - 94], first, whole.layers, FACTS)
        part.save(piece_path(folder, first))
    (folder / "notes.txt").write_text("mine")
    found = Trace.load(tmp_path)
    assert np.array_equal(found.count, whole.count)
    assert (found.first_step, found.last_step) == (95, 103)
    assert np.array_equal(found.until(99).count, whole.count[:5])
    assert len(pieces(folder)) == 3
    assert all(map(is_runs_piece, pieces(folder)))


def test_counts_alone_are_enough(tmp_path: Path) -> None:
    found = Trace.load(write(tmp_path / "x.npz", count=np.ones((3, 2, 4, 5), dtype=np.int64)))
    assert (found.first_step, found.layers, found.facts, found.count.dtype) == (
        1,
        (0, 1),
        TraceFacts(),
        np.dtype(np.int32),
    )
    assert not is_runs_piece(tmp_path / "x.npz")


ONES = np.ones((3, 2, 4, 5), dtype=np.int32)
NEGATIVE = ONES.copy()
NEGATIVE[2, 1, 3, 4] = -7
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a negative count": ({"count": NEGATIVE}, r"at least 0, got -7 at \[step, .*\] = \[2, 1, 3, 4\]"),
    "three dimensions": (
        {"count": ONES[0]},
        r"count must be whole numbers of \[step, layer, source, expert\], got int32",
    ),
    "fractions": ({"count": ONES * 0.5}, r"count must be whole numbers of .*, got float64 \[3, 2, 4, 5\]"),
    "too large": ({"count": ONES.astype(np.int64) * 2**31}, "count must fit int32"),
    "no steps": ({"count": ONES[:0]}, r"count must have steps, layers, sources and experts, got \[0, 2, 4, 5\]"),
    "no count": ({"counts": ONES}, r"must have an array count, got others"),
    "a gap": ({"count": ONES, "step": np.array([4, 5, 7])}, "after 5 comes 7: plans look one step ahead"),
    "a step twice": ({"count": ONES, "step": np.array([4, 4, 5])}, "after 4 comes 4"),
    "other steps": ({"count": ONES, "step": np.array([4, 5])}, "step must number the 3 steps of count, got"),
    "other layers": ({"count": ONES, "layer": np.array([1])}, "layer must name the 2 layers of count, got 1"),
    "no nodes": (
        {"count": ONES, "about": np.array(json.dumps({"groups_per_node": 3}))},
        r"groups_per_node \(3\) must divide the number of sources \(4\)",
    ),
    "no facts": ({"count": ONES, "about": np.array("[1]")}, "about must be a JSON object"),
    "objects": ({"count": np.array([[1], [2, 3]], dtype=object)}, "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_trace_is_refused_by_its_name(fault: str, tmp_path: Path) -> None:
    arrays, text = BAD[fault]
    path = write(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"^trace {path}.*{text}.*; name a trace that `moetrain train"):
        Trace.load(path)


def test_other_files_and_other_experts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "x.txt").write_text("loads")
    np.save(tmp_path / "x.npy", ONES)
    for name in ("x.npz", "x.txt", "x.npy"):
        with pytest.raises(ValueError, match=rf"trace .*{name} must be an \.npz file of arrays .*; name a trace that"):
            Trace.load(tmp_path / name)
        assert not is_runs_piece(tmp_path / name)
    with pytest.raises(ValueError, match=r"none\.npz is not there; name a trace"):
        Trace.load(tmp_path / "none.npz")
    with pytest.raises(
        ValueError, match="must be a file, or a folder with pieces of a trace, and has none; train with"
    ):
        Trace.load(tmp_path)
    some_trace().save(tmp_path / "good.npz")
    with pytest.raises(ValueError, match="must be of 8 experts, got 6; name the trace of a run with as many"):
        Trace.load(tmp_path / "good.npz", num_experts=8)


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (some_trace(2, 6), "begins at step 6, and 4 is the last one before it"),
        (some_trace(2, 4), "begins at step 4, and 4 is the last one before it"),
        (some_trace(2, 5, sources=2), "must stay the same, but they are .* from step 5 on and .* another mesh"),
        (some_trace(2, 5, num_experts=5), "must stay the same"),
    ],
)
def test_pieces_that_do_not_fit_together_are_refused(second: Trace, text: str, tmp_path: Path) -> None:
    for part in (some_trace(2, 3), second):
        part.save(piece_path(tmp_path, part.first_step))
    with pytest.raises(ValueError, match=text):
        Trace.load(tmp_path)
