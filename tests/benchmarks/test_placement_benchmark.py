"""What bench_placement.py is built of. No timing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_placement import CORPUS, highest, of_trace, row_of
from placement_corpus import Corpus, by_node, read_trace
from placement_model import CLUSTERS, MODELS, break_even, costs_of
from placement_outcome import Outcome, SeatPlan, by_pair, by_token, least_load
from placement_peers import PEERS
from placement_peers.eplb import pack, replicate
from placement_planners import plan_ours

from moetrain.placement.trace import Trace, TraceFacts, piece_path

SMALL = Corpus(num_groups=8, groups_per_node=4, num_experts=16, top_k=4, num_tokens=64, slots=2)
CHOICE = next(SMALL.steps(0))
COUNT = SMALL.count(CHOICE)
STATIC = SeatPlan.even([[int(owner)] for owner in SMALL.owners()], SMALL.num_groups)


def test_the_corpus_is_what_it_says() -> None:
    assert CHOICE.shape == (8, 64, 4)
    assert all(len(set(chosen)) == 4 for chosen in CHOICE.reshape(-1, 4).tolist())
    assert COUNT.sum() == 8 * 64 * 4
    assert by_node(COUNT, 4).sum(1).tolist() == [1024.0, 1024.0]
    again, other = next(SMALL.steps(0)), next(SMALL.steps(1))
    assert np.array_equal(again, CHOICE)
    assert not np.array_equal(other, CHOICE)


def test_a_shift_changes_the_popular_experts() -> None:
    def correlation(shift_at: int | None) -> float:
        steps = replace(SMALL, num_tokens=512, drift=0.0).steps(3, shift_at=shift_at)
        before, after = (SMALL.count(next(steps)).sum(0) for _ in range(2))
        return float(np.corrcoef(before, after)[0, 1])

    assert correlation(None) > 0.95 > correlation(1)


def told(plan: SeatPlan, seats: dict[tuple[int, int, int], int]) -> tuple[float, float, float]:
    """Rows, rows between nodes and the hottest receiver, from the holder of every (source, token, expert)."""
    rows = {(source, token, holder) for (source, token, _), holder in seats.items() if holder != source}
    received = [sum(holder == group for _, _, holder in rows) for group in range(8)]
    return len(rows) / 512, sum(s // 4 != h // 4 for s, _, h in rows) / 512, max(received) / 64


def test_static_rows_are_counted_as_told() -> None:
    found = by_token(SMALL, CHOICE, STATIC)
    owner = SMALL.owners()
    seats = {
        (source, token, expert): int(owner[expert])
        for source in range(8)
        for token in range(64)
        for expert in CHOICE[source, token].tolist()
    }
    assert (found.rows, found.node_rows, found.hottest) == pytest.approx(told(STATIC, seats))
    assert by_pair(SMALL, CHOICE, STATIC).rows == found.rows
    assert np.array_equal(found.load_G, np.bincount(owner, COUNT.sum(0), 8))
    assert np.array_equal(found.load_G, STATIC.loads(COUNT))
    assert found.near_SG.sum() + found.far_SG.sum() == found.rows * 512


def test_tokens_assigned_whole_need_fewer_rows_at_the_same_loads() -> None:
    plan = plan_ours("moetrain", SMALL, by_node(COUNT, 4))
    token, pair = by_token(SMALL, CHOICE, plan), by_pair(SMALL, CHOICE, plan)
    assert token.rows < 0.95 * pair.rows
    assert np.abs(token.load_G - plan.loads(COUNT)).max() < 0.05 * token.load_G.mean()
    assert np.abs(pair.load_G - plan.loads(COUNT)).max() < 0.05 * pair.load_G.mean()


@pytest.mark.parametrize("name", PEERS)
def test_peers_give_every_expert_seats_within_the_slots(name: str) -> None:
    plan = PEERS[name](SMALL, COUNT)
    assert np.all(np.diff(plan.offset_E1) >= 1)
    for expert in range(SMALL.num_experts):
        holders = plan.holder_Z[plan.offset_E1[expert] : plan.offset_E1[expert + 1]].tolist()
        assert holders == sorted(set(holders))
    places = np.bincount(plan.holder_Z, minlength=8)
    assert places.max() <= 2 + SMALL.slots  # of even owners two each
    assert plan.loads(COUNT).sum() == pytest.approx(COUNT.sum())
    if name != "SmartMoE":
        assert highest(plan, COUNT) < highest(STATIC, COUNT)


def test_eplb_replicates_the_hottest_and_packs_the_heaviest_first() -> None:
    expert_R, each_E = replicate(np.array([9.0, 2.0, 4.0]), 5)
    assert expert_R.tolist() == [0, 1, 2, 0, 0]  # 9, then 4.5 against 4
    assert each_E.tolist() == [3.0, 2.0, 4.0]
    assert pack(np.array([4.0, 3.0, 2.0, 2.0]), 2).tolist() == [0, 1, 1, 0]


def test_no_plan_beats_the_bound() -> None:
    pytest.importorskip("scipy")
    count_E = np.array([90.0, 5.0, 3.0, 2.0])
    owner_E = np.array([0, 0, 1, 1])
    assert least_load(count_E, owner_E, 2, 0) == pytest.approx(95.0)
    assert least_load(count_E, owner_E, 2, 1) == pytest.approx(50.0)
    for name in ("hecate", "moetrain"):
        plan = plan_ours(name, SMALL, by_node(COUNT, 4))
        bound = least_load(COUNT.sum(0).astype(float), SMALL.owners(), 8, SMALL.slots)
        assert plan.loads(COUNT).max() >= bound * (1 - 1e-6)


def test_lines_are_means_and_ratios_to_static() -> None:
    def outcome(highest_load: float, rows: float) -> Outcome:
        return Outcome(np.array([highest_load, 2.0 - highest_load]), rows, rows / 2, rows * 3, COUNT[:1], COUNT[:1])

    row = row_of([outcome(1.5, 2.0), outcome(1.2, 4.0)], [1.0, 1.2], [outcome(1.0, 4.0), outcome(1.0, 8.0)])
    assert (row["gap_mean"], row["gap_max"]) == pytest.approx((1.25, 1.5))
    assert (row["rows"], row["rows_ratio"], row["node_rows_ratio"]) == (3.0, 0.5, 0.5)


def test_the_point_of_break_even_is_where_no_larger_one_loses() -> None:
    rows = [
        {"tokens": tokens, "overlap": 1.0, "moetrain": gain}
        for tokens, gain in ((256, 1.1), (1024, 0.9), (4096, 1.0), (16384, 1.5))
    ]
    assert break_even(rows, "moetrain", 1.0) == 4096
    assert break_even(rows[:2], "moetrain", 1.0) is None
    assert break_even(rows, "moetrain", 0.5) is None


def test_modelled_costs_grow_with_the_model_and_fall_with_the_hardware() -> None:
    small, large = (costs_of(model, CLUSTERS[0], 1024) for model in MODELS[:2])
    faster = costs_of(MODELS[0], CLUSTERS[1], 1024)
    assert large.pair_s == 4 * small.pair_s
    assert large.expert_bytes == 4 * small.expert_bytes == 4 * 6 * 4 * 768**2
    assert small.far_row_s == 4 * faster.far_row_s == pytest.approx(8 * 768 / 1.5625e9)
    assert costs_of(MODELS[0], CLUSTERS[0], 1024, 0.5).overlap_s == small.overlap_s / 2


def test_traces_are_planned_step_by_step(tmp_path: Path) -> None:
    steps = SMALL.steps(1)
    count = np.stack([np.stack([SMALL.count(next(steps)) for _ in range(2)]) for _ in range(4)])
    path = tmp_path / "loads.npz"
    np.savez(path, count=count)
    figures = of_trace(read_trace(path), 4, 2)
    assert figures["trace"] == {"steps": 4, "layers": 2, "sources": 8, "experts": 16}
    assert 1 <= figures["load_given"]["moetrain"] < 1.05 < figures["load_given"]["static"]
    assert figures["load_given"]["moetrain"] < figures["load_next"]["moetrain"] < figures["load_next"]["static"]
    assert 0 < figures["prediction_error"] < 1
    with pytest.raises(ValueError, match=r"must divide the 8 sources of the trace, got 3"):
        of_trace(count, 3, 2)


def test_a_trace_in_pieces_is_read_whole(tmp_path: Path) -> None:
    count = np.random.default_rng(0).integers(0, 9, (5, 2, 4, 6)).astype(np.int32)
    for begin, end in ((0, 2), (2, 5)):
        Trace(count[begin:end], begin + 1, (1, 3), TraceFacts()).save(piece_path(tmp_path, begin + 1))
    assert np.array_equal(read_trace(tmp_path), count)


def test_traces_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "loads.npz"
    np.savez(path, counts=np.zeros((3, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"must have an array count, got others"):
        read_trace(path)
    np.savez(path, count=np.ones((2, 1, 2, 2), np.int64))
    with pytest.raises(ValueError, match=r"must have at least 3 steps, got 2"):
        read_trace(path)
    count = np.ones((3, 1, 2, 2), np.int64)
    count[1, 0, 1, 0] = -4
    np.savez(path, count=count)
    with pytest.raises(ValueError, match="-4"):
        read_trace(path)


def test_the_corpus_of_the_figures_is_the_one_that_targets_name() -> None:
    assert Corpus(32, 8, 64, 8, 512, 0.8, 0.1, 2) == CORPUS
