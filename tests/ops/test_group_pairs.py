"""group_pairs against torch's stable sort. Every comparison is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops import group_pairs


def reference(expert_id_P: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    bucket_P = torch.where(expert_id_P < 0, num_experts, expert_id_P.long())
    count_E = torch.bincount(bucket_P, minlength=num_experts + 1)[:num_experts]
    offset_E1 = torch.cat([count_E.new_zeros(1), count_E.cumsum(0)])
    return bucket_P.sort(stable=True).indices.int(), offset_E1.int()


def require_sorted(pair_N: Tensor, offset_E1: Tensor, expert_id_P: Tensor, num_experts: int) -> None:
    wanted_pair_N, wanted_offset_E1 = reference(expert_id_P, num_experts)
    assert pair_N.dtype == offset_E1.dtype == torch.int32
    assert torch.equal(offset_E1, wanted_offset_E1)
    assert torch.equal(pair_N, wanted_pair_N)


def ids(num_pairs: int, num_experts: int, least: int = -1) -> Tensor:
    return torch.randint(
        least, num_experts, (num_pairs,), generator=torch.Generator().manual_seed(num_pairs), dtype=torch.int32
    )


@pytest.mark.parametrize("num_experts", [1, 7, 64, 257])
@pytest.mark.parametrize("num_pairs", [0, 1, 37, 1024, 1025, 50_000])
def test_is_the_stable_sort(device: str, num_pairs: int, num_experts: int) -> None:
    expert_id_P = ids(num_pairs, num_experts).to(device)
    require_sorted(*group_pairs(expert_id_P, num_experts), expert_id_P, num_experts)


@pytest.mark.parametrize("fill", [-1, 0, 5])
def test_all_pairs_in_one_place(device: str, fill: int) -> None:
    expert_id_P = torch.full((20_000,), fill, dtype=torch.int32, device=device)
    pair_N, offset_E1 = group_pairs(expert_id_P, 6)
    assert torch.equal(pair_N, torch.arange(20_000, dtype=torch.int32, device=device))
    assert offset_E1.tolist() == [0 if fill < 0 or e <= fill else 20_000 for e in range(7)]


def test_a_rank_without_experts(device: str) -> None:
    pair_N, offset_E1 = group_pairs(torch.full((5,), -1, dtype=torch.int32, device=device), 0)
    assert pair_N.tolist() == [0, 1, 2, 3, 4]
    assert offset_E1.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9).flatmap(lambda E: st.tuples(st.just(E), st.lists(st.integers(-1, E - 1), max_size=70))))
def test_any_list(case: tuple[int, list[int]]) -> None:
    num_experts, listed = case
    expert_id_P = torch.tensor(listed, dtype=torch.int32)
    require_sorted(*group_pairs(expert_id_P, num_experts), expert_id_P, num_experts)


def test_the_number_of_threads_changes_nothing() -> None:
    expert_id_P = ids(100_000, 60)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(group_pairs(expert_id_P, 60))
    finally:
        torch.set_num_threads(before)
    for pair_N, offset_E1 in results:
        require_sorted(pair_N, offset_E1, expert_id_P, 60)


def test_an_unstable_or_wrong_result_is_caught() -> None:
    expert_id_P = torch.tensor([1, 0, 1, -1], dtype=torch.int32)
    pair_N, offset_E1 = group_pairs(expert_id_P, 2)
    assert pair_N.tolist() == [1, 0, 2, 3]
    assert offset_E1.tolist() == [0, 1, 3]
    with pytest.raises(AssertionError):
        require_sorted(pair_N[[0, 2, 1, 3]], offset_E1, expert_id_P, 2)
    with pytest.raises(AssertionError):
        require_sorted(pair_N, offset_E1 + 1, expert_id_P, 2)


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1])
@pytest.mark.parametrize("position", [0, 49_999])
def test_an_id_out_of_range_is_named_with_its_position(
    device: str, monkeypatch: pytest.MonkeyPatch, bad: int, position: int
) -> None:
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    expert_id_P = ids(50_000, 4).to(device)
    expert_id_P[position] = bad
    text = rf"group_pairs: expert ids must be -1 or in \[0, 4\), got {bad} at position {position}"
    with pytest.raises(ValueError, match=text):
        group_pairs(expert_id_P, 4)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="group_pairs: expert_id must be Int, got Long; convert it"):
        group_pairs(torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"group_pairs: expert_id must be \[P\], got \[2, 2\]; flatten it"):
        group_pairs(torch.zeros(2, 2, dtype=torch.int32), 2)
    with pytest.raises(
        ValueError, match=r"group_pairs: expert_id must be contiguous, got sizes \[3\] with strides \[2\]"
    ):
        group_pairs(torch.zeros(6, dtype=torch.int32)[::2], 2)
    with pytest.raises(ValueError, match="group_pairs: num_experts must be at least 0, got -1"):
        group_pairs(torch.zeros(3, dtype=torch.int32), -1)
    with pytest.raises(ValueError, match="num_experts \\+ 1 must be between 0 and 2147483647"):
        group_pairs(torch.zeros(3, dtype=torch.int32), 2**31 - 1)


def test_more_pairs_than_int32_can_number_are_refused() -> None:
    expert_id_P = torch.zeros(1, dtype=torch.int32).expand(2**31)
    with pytest.raises(ValueError, match="the number of pairs must be between 0 and 2147483647"):
        group_pairs(expert_id_P, 2)


def test_registration(device: str) -> None:
    torch.library.opcheck(torch.ops.moetrain.group_pairs.default, (ids(37, 5).to(device), 5))
