"""What the benchmark of sparse collectives says travels; its times are nobody's promise. Its ways agree first."""

from typing import Any

import pytest
from bench_sparse import Case, Found, all_cases, measure, table
from ranks import run_on_ranks

pytestmark = pytest.mark.dist


def watched(world: int, cases: list[Case], rounds: int) -> list[list[Found]]:
    """On ranks that say where they stood if they do not answer."""
    return run_on_ranks(world, all_cases, cases, rounds)


def test_bytes_are_those_of_the_chunks_that_have_to_move() -> None:
    cases = [Case(4, pattern, 8, 2, 64, per_node=2) for pattern in ("hot", "random", "full")]
    results: list[dict[str, Any]] = measure(cases, rounds=1, start=watched)
    assert len(table(results).splitlines()) == 2 + len(cases)
    chunk = 64 * (2 + 4)  # a weight and its gradient
    for case, result in zip(cases, results, strict=True):
        sent = result["bytes"]
        received = {"hot": 4 * case.slots, "random": 4 * case.slots, "full": 8 * 3}[case.pattern]
        assert sent["moetrain"] == sent["two levels"] == sent["batch_isend_irecv"] == received * chunk
        assert sent["dense"] == 8 * 3 * chunk
        assert result["byte_ratio_dense"] == received / 24
        crossing = result["between_nodes"]
        assert crossing["two levels"] <= crossing["moetrain"] == crossing["batch_isend_irecv"]
    assert results[2]["two_level_crossing_ratio"] == 0.5, "each expert once instead of to both ranks of a node"


def test_one_node_has_no_second_level() -> None:
    (result,) = measure([Case(2, "full", 4, 0, 16, per_node=2)], rounds=1, start=watched)
    assert result["two_level_crossing_ratio"] is None
    assert set(result["between_nodes"].values()) == {0}
