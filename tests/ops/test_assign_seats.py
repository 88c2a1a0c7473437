"""assign_seats against its definition in plain Python, and what it promises of quotas and rows. All exact."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.seat_cases import Case, case_of, ints
from torch import Tensor

from moetrain.ops import assign_seats
from moetrain.ops.reference_assign_seats import assign_seats_reference


def check(case: Case, device: str = "cpu") -> None:
    pair_N, offset_Z1 = case.run(device)
    wanted_pair_N, wanted_offset_Z1 = assign_seats_reference(*case.listed, **case.options)
    assert pair_N.dtype == offset_Z1.dtype == torch.int32
    assert torch.equal(offset_Z1.cpu(), wanted_offset_Z1)
    assert torch.equal(pair_N.cpu(), wanted_pair_N)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_tokens": 0},
        {"num_tokens": 1},
        {"num_tokens": 256, "num_groups": 1, "domain_size": 1},
        {"num_tokens": 257, "top_k": 8},
        {"num_tokens": 700, "num_experts": 5, "top_k": 1, "domain_size": 6},
        {"num_experts": 40, "top_k": 12, "num_groups": 9, "domain_size": 4, "tail": 50},
        {"most_share": 100_000},
    ],
    ids=str,
)
def test_equals_the_definition(device: str, sizes: dict[str, int]) -> None:
    for seed in range(3):
        check(case_of(seed, **sizes), device)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(0, 300), st.integers(1, 12), st.integers(1, 6), st.integers(1, 8),
    st.integers(1, 8), st.integers(0, 3),
)  # fmt: skip
def test_any_sizes(
    seed: int, num_tokens: int, num_experts: int, top_k: int, num_groups: int, domain_size: int, tail: int
) -> None:
    check(case_of(seed, num_tokens, num_experts, top_k, num_groups, domain_size, tail))


def test_groups_far_apart_get_the_same(device: str) -> None:
    """On CUDA so many groups do not fit in shared memory."""
    case = case_of(0, num_tokens=600)  # of source 0, so that the turns stay
    spread = {name: 3000 * case.options[name] for name in ("num_groups", "domain_size")}
    far = Case((*case.listed[:3], 3000 * case.listed[3], case.listed[4]), {**case.options, **spread})
    assert all(torch.equal(one.cpu(), other) for one, other in zip(far.run(device), case.run(), strict=True))


def seats_of(case: Case) -> list[int]:
    """The seat of each pair."""
    pair_N, offset_Z1 = case.run()
    seat_N = torch.empty(case.pairs, dtype=torch.int64)
    seat_N[pair_N[: case.pairs].long()] = torch.arange(len(offset_Z1) - 1).repeat_interleave(offset_Z1.diff())
    seats: list[int] = seat_N.tolist()
    return seats


def test_every_seat_gets_its_share_to_the_nearest_whole_number() -> None:
    for seed in range(10):
        case = case_of(seed, num_tokens=500)
        _, offset_E1, seat_offset_E1, _, share_Z = case.listed
        count_Z = torch.bincount(ints(seats_of(case)).long(), minlength=len(share_Z))
        for expert in range(8):
            seats = slice(*seat_offset_E1[expert : expert + 2].tolist())
            pairs, shares = int(offset_E1.diff()[expert]), share_Z[seats].double()
            assert int(count_Z[seats].sum()) == pairs
            assert ((count_Z[seats] - pairs * shares / shares.sum()).abs() < 1).all()


def test_shares_that_add_up_to_the_pairs_are_the_numbers_of_pairs() -> None:
    case = case_of(3, num_tokens=400)
    count_Z = torch.bincount(ints(seats_of(case)).long(), minlength=len(case.listed[4]))
    for source in range(6):
        again = replace(case, listed=(*case.listed[:4], count_Z.int()), options={**case.options, "source": source})
        assert torch.equal(torch.bincount(ints(seats_of(again)).long(), minlength=len(count_Z)), count_Z)


def test_rounding_does_not_add_up_over_sources() -> None:
    """One pair per source and expert, two seats of equal share: about half of the sources take the first."""
    listed = (ints([0]), ints([0, 1]), ints([0, 2]), ints([0, 1]), ints([1, 1]))
    first = 0
    for source in range(2, 66):
        options: dict[str, Any] = {"num_tokens": 1, "num_groups": 66, "source": source, "domain_size": 1}
        first += int(assign_seats(*listed, **options)[1][1])
    assert 24 <= first <= 40


def test_home_comes_first_then_the_fullest_holder_then_the_own_node_then_the_lower() -> None:
    # Expert 0: groups 0, 3; expert 1: groups 1, 2; expert 2: groups 1, 2; one token that wants all of them.
    def choose(source: int, domain_size: int, holders: list[int] | None = None) -> list[int]:
        token_N, offset_E1, seat_offset_E1 = ints([0, 0, 0]), ints([0, 1, 2, 3]), ints([0, 2, 4, 6])
        holder_Z = ints(holders or [0, 3, 1, 2, 1, 2])
        chosen = []
        for share_Z in (ints([1, 0, 1, 0, 1, 0]), ints([0, 1, 0, 1, 0, 1])):
            listed = (token_N, offset_E1, seat_offset_E1, holder_Z, share_Z)
            options: dict[str, Any] = {"num_tokens": 1, "num_groups": 4, "source": source, "domain_size": domain_size}
            chosen.append([int(holder_Z[z]) for z in seats_of(Case(listed, options))])
        assert chosen == [holder_Z[0::2].tolist(), holder_Z[1::2].tolist()], "quotas bind"
        return chosen[0]

    choose(0, 1)
    # Two tokens and quotas of one each: the first token's choice shows the order of preference.
    token_N, offset_E1, seat_offset_E1 = ints([0, 1, 0, 1]), ints([0, 2, 4]), ints([0, 2, 4])

    def first_token(holders: list[int], source: int, domain_size: int) -> list[int]:
        listed = (token_N, offset_E1, seat_offset_E1, ints(holders), ints([1, 1, 1, 1]))
        options: dict[str, Any] = {"num_tokens": 2, "num_groups": 8, "source": source, "domain_size": domain_size}
        seats = seats_of(Case(listed, options))
        return [holders[seats[0]], holders[seats[2]]]

    assert first_token([1, 2, 2, 3], 7, 1) == [2, 2], "the holder of both"
    assert first_token([1, 2, 2, 3], 1, 1) == [1, 2], "home, though another has both"
    assert first_token([1, 5, 1, 5], 4, 4) == [5, 5], "the own node"
    assert first_token([1, 5, 1, 5], 7, 1) == [1, 1], "the lower group"


def test_fewer_rows_leave_than_if_pairs_were_dealt_alone() -> None:
    case = case_of(1, num_tokens=2000, num_experts=32, top_k=6, num_groups=8)
    token_N, _, _, holder_Z, _ = case.listed
    greedy = {(int(t), int(holder_Z[z])) for t, z in zip(token_N.tolist(), seats_of(case), strict=True)}
    # The same quotas, but every pair on its own: pairs of a seat are drawn from the expert's at random.
    rng = torch.Generator().manual_seed(0)
    alone = set()
    seats = ints(seats_of(case))
    for expert in range(32):
        start, stop = case.listed[1][expert : expert + 2].tolist()
        dealt = seats[start:stop][torch.randperm(stop - start, generator=rng)]
        alone |= {(int(t), int(holder_Z[z])) for t, z in zip(token_N[start:stop].tolist(), dealt.tolist(), strict=True)}
    assert len(greedy) < 0.8 * len(alone)


def test_the_number_of_threads_changes_nothing() -> None:
    case = case_of(5, num_tokens=3000, num_experts=16)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(case.run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True))


@pytest.mark.parametrize(
    ("place", "values", "text"),
    [
        (0, [0, 0, 1, 1], "tokens must be below num_tokens and ascend inside an expert, got 0 at expert 0"),
        (0, [0, 1, 1, 2], "tokens must be below num_tokens and ascend inside an expert, got 2 at expert 1"),
        (1, [0, 2, 1], "offset must ascend, got 1 at expert 1"),
        (1, [0, 2, 5], "offset must begin at 0 and end within the pairs, got 5"),
        (2, [1, 2, 4], "seat_offset must begin at 0 and end within the seats, got 4"),
        (3, [1, 0, 0, 1], "holders must be below num_groups and ascend inside an expert, got 0 at expert 0"),
        (3, [0, 1, 0, 2], "holders must be below num_groups and ascend inside an expert, got 2 at expert 1"),
        (4, [1, 1, -1, 2], "shares must be at least 0, got -1 at expert 1"),
        (4, [1, 1, 0, 0], "an expert with pairs must have a share, got 0 at expert 1"),
        (4, [1, 1, 1 << 24, 1], "shares must add up to at most 2^24, got 16777217 at expert 1"),
    ],
)
def test_lists_that_break_a_promise_are_refused(place: int, values: list[int], text: str) -> None:
    listed = [ints([0, 1, 0, 1]), ints([0, 2, 4]), ints([0, 2, 4]), ints([0, 1, 0, 1]), ints([1, 1, 1, 1])]
    options: dict[str, Any] = {"num_tokens": 2, "num_groups": 2, "source": 0, "domain_size": 1}
    assign_seats(*listed, **options)
    listed[place] = ints(values)
    with pytest.raises(ValueError, match=re.escape(text)):
        assign_seats(*listed, **options)


def test_sizes_that_do_not_fit_are_refused() -> None:
    case = case_of(0)
    for change, text in (
        ({"num_tokens": 1 << 23}, "num_tokens must be between 0 and 4194304, got 8388608"),
        ({"source": 6}, "source a group below num_groups, got 6, 2 and 6"),
        ({"domain_size": 0}, "domain_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            replace(case, options={**case.options, **change}).run()
    with pytest.raises(ValueError, match=re.escape("share must be [Z]")):
        replace(case, listed=(*case.listed[:4], case.listed[4][:-1])).run()
    with pytest.raises(TypeError, match="holder must be Int"):
        replace(case, listed=(*case.listed[:3], case.listed[3].long(), case.listed[4])).run()


@pytest.mark.parametrize("wrong", ["a pair left out", "a seat of another expert", "two pairs exchanged"])
def test_the_checks_notice(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = Case.run

    def run(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
        pair_N, offset_Z1 = right(case, device)
        if wrong == "a pair left out":
            offset_Z1[-1] -= 1
        elif wrong == "a seat of another expert":
            offset_Z1[int(case.listed[2][1])] -= 1
        else:
            pair_N[:2] = pair_N[:2].flip(0)
        return pair_N, offset_Z1

    monkeypatch.setattr(Case, "run", run)
    with pytest.raises(AssertionError):
        check(case_of(0))
