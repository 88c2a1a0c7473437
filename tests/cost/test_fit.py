"""Costs from times."""

import numpy as np
import pytest

from moetrain.cost.fit import TimedItem, fit_pass
from moetrain.cost.sequence_costs import PassCosts

ITEMS = [(2048,), (128,) * 16, (4096,), (512,) * 8, (8192,), (1024,) * 8]


def timed(costs: PassCosts, lengths: tuple[int, ...]) -> TimedItem:
    return TimedItem(lengths, costs.of_item(lengths))


@pytest.mark.parametrize(
    "costs",
    [
        PassCosts(square_ms=1e-7, token_ms=3e-3, item_ms=0.5),
        PassCosts(square_ms=0.0, token_ms=3e-3),
        PassCosts(square_ms=2e-6, token_ms=0.0, item_ms=4.0),
        PassCosts(square_ms=0.0, token_ms=0.0, item_ms=4.0),
    ],
)
def test_costs_are_found_again(costs: PassCosts) -> None:
    found, worst = fit_pass([timed(costs, lengths) for lengths in ITEMS])
    assert [found.square_ms, found.token_ms, found.item_ms] == pytest.approx(
        [costs.square_ms, costs.token_ms, costs.item_ms], rel=1e-6, abs=1e-12
    )
    assert worst < 1e-6


def test_noise_makes_no_cost_negative_and_is_told() -> None:
    """Times that fall with length have a negative slope where nothing forbids it."""
    costs = PassCosts(square_ms=1e-8, token_ms=1e-3, item_ms=0.0)
    random = np.random.default_rng(0)
    for _ in range(50):
        noise = random.normal(1.0, 0.05, len(ITEMS))
        items = [TimedItem(lengths, timed(costs, lengths).ms * x) for lengths, x in zip(ITEMS, noise, strict=True)]
        found, worst = fit_pass(items)
        told = max(abs(found.of_item(item.lengths) / item.ms - 1) for item in items)
        assert worst == pytest.approx(told, rel=1e-6)
        assert found.token_ms == pytest.approx(1e-3, rel=0.25)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="items must be at least 3, got 2"):
        fit_pass([TimedItem((1,), 1.0)] * 2)
    with pytest.raises(ValueError, match=r"times must be positive, got 0\.0 ms"):
        fit_pass([TimedItem((1,), 1.0), TimedItem((2,), 0.0), TimedItem((3,), 1.0)])
