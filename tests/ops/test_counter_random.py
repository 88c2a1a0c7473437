import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops import counter_normal, counter_uniform, key_of

MASK = (1 << 64) - 1
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def splitmix_finalise(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def uniform_by_hand(key: int, index: int) -> float:
    """The definition in Python's integers, which do not wrap."""
    gamma, factor = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
    first = splitmix_finalise((index * gamma + key) & MASK)
    return (splitmix_finalise((first + (key * factor ^ gamma)) & MASK) >> 11) * 2.0**-53


def normal_by_hand(key: int, index: int) -> float:
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform_by_hand(key, index)))
    return radius * math.cos(2.0 * math.pi * uniform_by_hand(key ^ 0xD1B54A32D192ED03, index))


def test_key_is_fixed_for_ever() -> None:
    assert key_of(1, "w", 3) == 6884037910077029360


def test_keys_tell_types_order_and_boundaries_apart() -> None:
    parts = [("ab",), ("a", "b"), ("b", "a"), (1,), ("1",), (1, 2), (12,), (), ("",), (-1,)]
    keys = [key_of(*each) for each in parts]
    assert len(set(keys)) == len(parts)
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize("part", [1.5, True, None])
def test_key_refuses_other_parts(part: object) -> None:
    with pytest.raises(TypeError, match="key_of: parts must be int or str, got"):
        key_of("seed", part)  # type: ignore[arg-type]


def test_golden_values(device: str) -> None:
    index = torch.tensor([0, 1, 2**40, -1], device=device)
    uniform = counter_uniform(6884037910077029360, index, dtype=torch.float64)
    assert uniform.tolist() == [0.15871031335389874, 0.09716811165235029, 0.7074429868020553, 0.32127462463305756]
    normal = counter_normal(6884037910077029360, index, dtype=torch.float64)
    expected = [0.07095746518711082, -0.15139082053765276, -0.5006305212267492, 0.8800338966035269]
    assert normal.tolist() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(key=st.integers(0, 2**63 - 1), index=st.integers(-(2**63), 2**63 - 1))
def test_values_are_those_of_the_definition(key: int, index: int) -> None:
    at = torch.tensor([index])
    assert counter_uniform(key, at, dtype=torch.float64).item() == uniform_by_hand(key, index)
    assert counter_normal(key, at, dtype=torch.float64).item() == pytest.approx(normal_by_hand(key, index), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_of", [counter_uniform, counter_normal])
def test_a_subset_of_indices_gives_the_same_values(
    values_of: Callable[..., Tensor], dtype: torch.dtype, device: str
) -> None:
    whole = values_of(7, torch.arange(1000, device=device), dtype=dtype)
    subset = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:300].to(device)
    assert torch.equal(values_of(7, subset, dtype=dtype), whole[subset])
    assert torch.equal(values_of(7, subset.view(3, 100), dtype=dtype), whole[subset].view(3, 100))
    assert values_of(7, subset[:0], dtype=dtype).shape == (0,)
    assert not torch.equal(values_of(8, subset, dtype=dtype), whole[subset])


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_uniforms_truncate_the_wide_ones_and_stay_below_one(dtype: torch.dtype) -> None:
    index = torch.arange(100_000)
    wide = counter_uniform(3, index, dtype=torch.float64)
    narrow = counter_uniform(3, index, dtype=dtype)
    bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    assert narrow.dtype == dtype
    assert torch.equal(narrow.double(), (wide * 2.0**bits).floor() * 2.0**-bits)
    assert narrow.max() < 1


def test_statistics_of_uniforms() -> None:
    num = 400_000
    u = counter_uniform(key_of(0, "statistics"), torch.arange(num), dtype=torch.float64)
    six_sigma = 6 / math.sqrt(num)
    assert abs(u.mean().item() - 0.5) < six_sigma * math.sqrt(1 / 12)
    assert abs(((u - 0.5) ** 2).mean().item() - 1 / 12) < six_sigma * math.sqrt(1 / 180)
    per_bin = torch.histc(u, 64, 0.0, 1.0) - num / 64
    assert (per_bin**2 / (num / 64)).sum().item() < 63 + 6 * math.sqrt(2 * 63)  # chi-squared
    for lag in (1, 2, 64):
        assert abs(((u[lag:] - 0.5) * (u[:-lag] - 0.5)).mean().item()) * 12 < six_sigma


def test_statistics_of_normals() -> None:
    num = 400_000
    n = counter_normal(key_of(0, "statistics"), torch.arange(num), dtype=torch.float64)
    six_sigma = 6 / math.sqrt(num)
    assert abs(n.mean().item()) < six_sigma
    assert abs((n**2).mean().item() - 1) < six_sigma * math.sqrt(2)
    assert abs((n**3).mean().item()) < six_sigma * math.sqrt(15)
    assert abs((n**4).mean().item() - 3) < six_sigma * math.sqrt(96)
    assert abs((n[1:] * n[:-1]).mean().item()) < six_sigma


def test_neighbouring_keys_are_not_correlated() -> None:
    index = torch.arange(200_000)
    a, b = (counter_normal(key, index, dtype=torch.float64) for key in (1000, 1001))
    assert abs((a * b).mean().item()) < 6 / math.sqrt(len(index))


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"counter_uniform: index must be int64, got torch.int32; convert it"):
        counter_uniform(1, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"counter_normal: dtype must be float64, .* got torch.int64"):
        counter_normal(1, torch.zeros(2, dtype=torch.int64), dtype=torch.int64)
