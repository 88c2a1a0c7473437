"""What compare_checkouts.py makes of two versions' seconds, and the operators that it times."""

import checkout_ops
import pytest
from compare_checkouts import summary


def test_ratios_are_medians_of_older_over_newer() -> None:
    runs = {
        "older": [{"step": 4.0, "dense matmul": 1.0, "gone": 0.0}, {"step": 9.0, "dense matmul": 3.0, "gone": 0.0}] * 2,
        "newer": [{"step": 2.0, "dense matmul": 4.0, "gone": 1.0}],
    }
    assert summary(runs) == {"step_ratio": 3.25, "dense_matmul_ratio": 0.5}


def test_every_operator_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"T": 16, "D": 8, "F": 8, "E": 4, "K": 2, "HEADS": 1, "HEAD_DIM": 8, "ROWS": 2}.items():
        monkeypatch.setattr(checkout_ops, name, size)
    monkeypatch.setattr(checkout_ops, "SECONDS", 0.0)
    seconds = {name: checkout_ops.seconds_of(call) for name, call in checkout_ops.cases().items()}
    assert len(seconds) == 13
    assert all(value > 0 for value in seconds.values())
