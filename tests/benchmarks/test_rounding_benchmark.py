"""What bench_rounding.py and rounding_quality.py are built of. No timing."""

import pytest
import torch
from bench_rounding import SHAPES, TILE, Routed, by_sorting, ours, padding
from bench_rounding_gain import HEAD, line, measure
from rounding_quality import table
from shapes import Shape, rounding_sweeps


def test_sorting_keeps_what_ours_keeps() -> None:
    routed = Routed.random(2000, 12, 3)
    token_N, end_E = by_sorting(routed)
    mine = ours(routed)
    assert torch.equal(mine.offset_E1[1:].long(), end_E)
    assert torch.equal(mine.token_P[: len(token_N)].long(), token_N)
    assert int(mine.added_E.sum()) > 0


def test_padding_is_counted_in_shares_of_all_pairs() -> None:
    num_tokens, num_experts, top_k = SHAPES["quick start"]
    row = padding("quick start")
    assert row.formula == pytest.approx(num_experts * TILE / (2 * num_tokens * top_k))
    count_E = Routed.random(num_tokens, num_experts, top_k).offset_E1.diff().tolist()
    assert row.before == pytest.approx(sum(-count % TILE for count in count_E) / (num_tokens * top_k))
    assert row.after == 0.0


def test_a_rule_is_compared_with_top_k_seed_by_seed() -> None:
    def runs(*losses: float) -> list[dict[str, float]]:
        return [
            {"seed": seed, "validation_loss": loss, "rows_added": 30, "rows_dropped": 10}
            for seed, loss in enumerate(losses)
        ]

    lines = table({"none": runs(2.0, 3.0), "up": runs(2.5, 3.25)}, 1000).splitlines()
    assert lines[3] == "| up | 2.5000 | 3.2500 | 2.8750 | +0.3750 ± 0.1768 | 3.00% | 1.00% |"
    assert lines[-1] == "Spread of top-k over seeds: 0.7071 nats."


def test_the_gain_is_measured_on_the_same_layer() -> None:
    sweeps = rounding_sweeps(1024)
    assert [shape.E for shape in sweeps[:4]] == [64, 128, 256, 512]
    assert len({shape.name for shape in sweeps}) == 16
    gain = measure(Shape("small", T=600, D=16, F=8, E=4, K=2), "cpu", rounds=1)
    routed = Routed.random(600, 4, 2)
    assert gain.rows_ratio == int(ours(routed).offset_E1[-1]) / 1200
    assert gain.rows_ratio != 1.0
    assert all(ratio > 0 for ratio in gain.ratios)
    assert line(gain).count("|") == HEAD[0].count("|") == HEAD[1].count("|")
