"""What is made of measured times, on a clock that the test turns: real times are no test."""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

import pytest
import torch
import torch.distributed as dist
from known import world_group
from ranks import run_on_ranks

from moetrain.cost import measure
from moetrain.cost.measure import LARGE_BYTES, REPEATS, LayerSample, Peers, measure_costs, median_s, rounded
from moetrain.cost.step_costs import StepCosts

ROW_BYTES, NEAR_BYTE_S, FAR_BYTE_S = 64, 1e-9, 1e-8
CPU = torch.device("cpu")


@dataclass
class Clock:
    now: float = 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def read(self, device: torch.device) -> float:
        return self.now


def sample(compute: Callable[[], object], *, hides: bool) -> LayerSample:
    return LayerSample(
        compute, num_pairs=4, pair_flops=10.0, other_flops=500.0, hides=hides, row_bytes=ROW_BYTES, expert_bytes=4096
    )


def measured(rank: int, peers: Peers, hides: bool, own_numbers: bool = False) -> StepCosts:
    """On a rank whose work takes (rank + 1) * 2 seconds, over links that take as long as their bytes."""
    clock, exchange = Clock(), measure._there_and_back
    byte_s = {peers.near: NEAR_BYTE_S} | {peers.far: FAR_BYTE_S}

    def timed_exchange(message: torch.Tensor, peer: int, group: dist.ProcessGroup) -> None:
        exchange(message, peer, group)
        clock.advance(2 * message.nbytes * byte_s[peer])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "now", clock.read)
        patch.setattr(measure, "_there_and_back", timed_exchange)
        if own_numbers:
            patch.setattr(dist, "broadcast", lambda *args, **kwargs: None)
        return measure_costs(sample(lambda: clock.advance(2.0 * (rank + 1)), hides=hides), peers, world_group(), CPU)


def expected(near_byte_s: float, far_byte_s: float, overlap_s: float) -> StepCosts:
    near_row_s, far_row_s = (rounded(4 * ROW_BYTES * byte_s) for byte_s in (near_byte_s, far_byte_s))
    return StepCosts(0.5, near_row_s, far_row_s, rounded(far_byte_s), 4096.0, overlap_s)


CASES = {
    "near and far": (3, Peers(1, 2), expected(NEAR_BYTE_S, FAR_BYTE_S, 25.0), True),
    "near alone": (2, Peers(1, None), expected(NEAR_BYTE_S, NEAR_BYTE_S, 0.0), False),
    "far alone": (3, Peers(None, 2), expected(FAR_BYTE_S, FAR_BYTE_S, 0.0), False),
    "nobody": (1, Peers(None, None), expected(0.0, 0.0, 25.0), True),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_first_ones_numbers(case: str) -> None:
    ranks, peers, costs, hides = CASES[case]
    for found in run_on_ranks(ranks, measured, peers, hides):
        assert astuple(found) == pytest.approx(astuple(costs), rel=1e-6)
        assert [rounded(seconds) for seconds in astuple(found)[:4]] == [*astuple(found)[:4]]
    assert len({astuple(found) for found in run_on_ranks(ranks, measured, peers, hides)}) == 1


@pytest.mark.dist
def test_numbers_of_ones_own_would_show() -> None:
    assert len({astuple(found) for found in run_on_ranks(2, measured, Peers(1, None), False, True)}) == 2


def test_the_median_knows_neither_the_first_run_nor_an_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, took = Clock(), iter([1000.0, *[1.0] * 3, 2.0, *[500.0] * 3, *[2.0] * 3, 3.0])
    monkeypatch.setattr(measure, "now", clock.read)
    assert median_s(lambda: clock.advance(next(took)), CPU) == 2.0
    assert next(took, None) is None
    assert REPEATS == 11


@pytest.mark.parametrize("number", [0.0, 1.0, 1.2345e-9, 98765.4, 2.0**-40])
def test_three_digits_are_kept(number: float) -> None:
    assert rounded(number) == pytest.approx(number, rel=5e-3)
    assert rounded(rounded(number)) == rounded(number)
    digits = 0.0 if number == 0 else rounded(number) / 10 ** (math.floor(math.log10(rounded(number))) - 2)
    assert digits == pytest.approx(round(digits), rel=1e-9)


def test_costs_travel_as_plain_values() -> None:
    costs = StepCosts(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    assert StepCosts.from_dict(costs.to_dict()) == costs
    values = costs.to_dict()
    for bad in ({**values, "more": 1.0}, {name: values[name] for name in list(values)[1:]}, {**values, "pair_s": "1"}):
        with pytest.raises(
            ValueError, match=r"costs must be numbers called pair_s, near_row_s, .*; measure them again"
        ):
            StepCosts.from_dict(bad)  # type: ignore[arg-type]
    assert LARGE_BYTES > 64 * ROW_BYTES
