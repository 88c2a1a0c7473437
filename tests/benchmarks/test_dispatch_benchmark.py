"""What the dispatch benchmark says travels; its times are nobody's promise. Its forms are compared before it counts."""

from typing import Any

import pytest
from bench_dispatch import Case, Found, all_cases, measure, table
from ranks import run_on_ranks

pytestmark = pytest.mark.dist
TOKENS = 128


def watched(world: int, cases: list[Case], rounds: int) -> list[list[Found]]:
    """On ranks that say where they stood if they do not answer."""
    return run_on_ranks(world, all_cases, cases, rounds)


def test_never_more_rows_than_k_copies_and_half_of_them_at_eight() -> None:
    cases = [Case(4, top_k, skew, TOKENS, 64, 64, per_node=2) for top_k in (1, 2, 8) for skew in (0.0, 1.0)]
    results: list[dict[str, Any]] = measure(cases, rounds=1, start=watched)
    assert len(table(results).splitlines()) == 2 + len(cases)
    for case, result in zip(cases, results, strict=True):
        rows, between = result["payload_rows"], result["row_bytes_between_nodes"]
        assert 0 < rows["moetrain"] <= rows["K copies"] <= 2 * 4 * TOKENS * case.top_k
        assert result["payload_row_ratio"] == rows["moetrain"] / rows["K copies"]
        assert rows["all-gather"] == rows["all-gather by pairs"] == 2 * 4 * TOKENS * 3
        assert 0 < between["two levels"] <= between["moetrain"] <= between["K copies"]
        if case.top_k == 1:
            assert rows["moetrain"] == rows["K copies"]
        if case.top_k == 8 and case.skew == 0.0:
            assert result["payload_row_ratio"] <= 0.55
            # Of a token's 8 of 64 experts a rank of 4 has none with probability (48 choose 8) / (64 choose 8) = 0.085.
            assert rows["moetrain"] == pytest.approx(2 * 4 * TOKENS * 3 * (1 - 0.085), rel=0.03)


def test_one_node_has_no_second_level() -> None:
    (result,) = measure([Case(2, 2, 0.0, 16, 8, 8, per_node=2)], rounds=1, start=watched)
    assert result["two_level_crossing_ratio"] is None
    assert set(result["bytes_between_nodes"].values()) == {0}  # type: ignore[attr-defined]
