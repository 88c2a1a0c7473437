"""What bench_bandwidth.py counts and checks. No timing."""

from collections.abc import Iterable
from typing import Any

import bench_bandwidth
import pytest
import torch
from bench_bandwidth import Move, Sizes, chunk_moves, measure, router_moves, row_moves

from moetrain.ops import chunk_table

SMALL = Sizes(T=24, D=16, E=6, K=2, C=3, L=20)


def test_bytes_are_those_that_a_call_asks_for() -> None:
    moves = [*row_moves(SMALL, torch.bfloat16, "cpu"), *router_moves(SMALL, "cpu")]
    moves += chunk_moves(SMALL, torch.float32, torch.bfloat16, "cpu")
    assert {move.name: move.num_bytes for move in moves} == {
        "gather_rows": 2 * 48 * 16 * 2 + 48 * 4,
        "scatter_add_rows": 48 * 16 * 2 + 24 * 16 * 2 + 48 * 8,
        "route": 24 * 6 * 4 + 48 * 8,
        "pack_chunks, float32 to bfloat16": 60 * 6,
        "pack_chunks, bfloat16 to bfloat16": 60 * 4,
        "unpack_chunks, bfloat16 to float32": 60 * 6,
        "add_sources, 4 x bfloat16 to float32": 60 * 12,
    }
    assert all(move.is_right() for move in moves)


def test_a_wrong_answer_is_not_timed() -> None:
    with pytest.raises(ValueError, match="moved: the answer is wrong; nothing was timed"):
        measure(Move("moved", 8, lambda: None, lambda: False), "cpu", 1)


def test_the_checks_see_a_wrong_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = chunk_table

    def moved_aside(rows: Iterable[tuple[int, ...]], *rest: Any) -> torch.Tensor:
        first, *others = rows
        return real([(*first[:-3], first[-3] + SMALL.L, *first[-2:]), *others], *rest)

    monkeypatch.setattr(bench_bandwidth, "chunk_table", moved_aside)
    moves = list(chunk_moves(SMALL, torch.float32, torch.bfloat16, "cpu"))
    assert not any(move.is_right() for move in moves)


def test_a_share_is_the_copys_time_over_ours() -> None:
    (gather, _) = row_moves(SMALL, torch.bfloat16, "cpu")
    found = measure(gather, "cpu", 1)
    assert found.share == found.copy_ms / found.ms
    assert found.target == 0.85
    assert "| gather_rows |" in found.line
