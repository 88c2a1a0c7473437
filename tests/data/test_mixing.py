import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.mixing import Interleaving, apportion


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-3), st.integers(8, 500))
def test_shares_sum_and_are_near_their_ideal(weights: list[float], total: int) -> None:
    shares = apportion(weights, total)
    assert sum(shares) == total
    raised = sum(w > 0 and w / sum(weights) * total < 1 for w in weights)  # the quotient itself may underflow to 0
    for weight, share in zip(weights, shares, strict=True):
        assert (share == 0) == (weight == 0)
        assert abs(share - weight / sum(weights) * total) < 1 + raised


def test_known_shares() -> None:
    assert apportion([0.5, 0.3, 0.2, 0.0], 8) == [4, 2, 2, 0]
    assert apportion([1e9, 1.0, 1.0], 10) == [8, 1, 1]
    assert apportion([1.0, 1.0, 1.0], 10) == [4, 3, 3]


@pytest.mark.parametrize(("weights", "total"), [([0.0, 0.0], 4), ([1.0, 1.0, 1.0], 2), ([], 3)])
def test_impossible_shares(weights: list[float], total: int) -> None:
    with pytest.raises(ValueError, match="apportion: "):
        apportion(weights, total)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_each_domain_counts_up_and_prefixes_are_balanced(counts: list[int]) -> None:
    mix = Interleaving(counts)
    period = sum(counts)
    assert len(mix) == period
    seen = [0] * len(counts)
    for row_id in range(2 * period + 3):
        domain, row = mix.locate(row_id)
        assert row == seen[domain]
        seen[domain] += 1
        for found, count in zip(seen, counts, strict=True):
            assert abs(found - (row_id + 1) * count / period) <= 1 + len(counts) / 2


def test_access_is_random() -> None:
    mix = Interleaving([3, 1])
    assert [mix.locate(i) for i in range(8)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]
    assert mix.locate(4 * 10**12 + 2) == (1, 10**12)


def test_nothing_to_mix() -> None:
    assert len(Interleaving([])) == 0
    assert len(Interleaving([0, 0])) == 0
