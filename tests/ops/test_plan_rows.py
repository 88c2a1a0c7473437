"""plan_sends and plan_receives against loops that follow each pair by hand. Every comparison is exact."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.ops import plan_receives, plan_rows, plan_sends

OPS = torch.ops.moetrain
Sends = Callable[..., tuple[Tensor, ...]]


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def a_case(
    num_tokens: int, num_ranks: int, per_rank: int, top_k: int, seed: int = 0, extra: int = 3
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[int, int, int]]:
    """Random choices of ``top_k`` experts per token (some tokens have none), experts dealt out to ranks by turns."""
    chance = torch.Generator().manual_seed(seed)
    num_experts = num_ranks * per_rank
    chosen = [torch.randperm(num_experts, generator=chance)[:top_k].tolist() for _ in range(num_tokens)]
    chosen = [experts if idx % 5 else [] for idx, experts in enumerate(chosen)]
    by_expert = [[t for t in range(num_tokens) if e in chosen[t]] for e in range(num_experts)]
    token_N = ints([*(t for tokens in by_expert for t in tokens), *[-7] * extra])
    offset_E1 = ints([0, *torch.tensor([len(tokens) for tokens in by_expert]).cumsum(0).tolist()])
    rank_E = torch.arange(num_experts, dtype=torch.int32) % num_ranks
    local_E = torch.arange(num_experts, dtype=torch.int32) // num_ranks
    return (token_N, offset_E1, rank_E, local_E, ints([seed % 2])), (num_tokens, num_ranks, per_rank)


def assert_sends(found: tuple[Tensor, ...], lists: tuple[Tensor, ...], sizes: tuple[int, int, int]) -> None:
    token_C, pair_N, row_N, counts_WK = (tensor.tolist() for tensor in found)
    token, offset, rank, local, (bad,) = (tensor.tolist() for tensor in lists)
    num_tokens, num_ranks, max_local = sizes
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    pairs: list[list[int]] = [[] for _ in range(num_ranks)]
    counts = [[0, bad, *[0] * max_local] for _ in range(num_ranks)]
    for expert in range(len(rank)):
        for pair in range(offset[expert], offset[expert + 1]):
            pairs[rank[expert]].append(pair)
            counts[rank[expert]][2 + local[expert]] += 1
    for w in range(num_ranks):
        rows[w] = sorted({token[pair] for pair in pairs[w]})
        counts[w][0] = len(rows[w])
    assert counts_WK == counts
    assert token_C[: sum(map(len, rows))] == list(chain.from_iterable(rows))
    assert pair_N[: offset[-1]] == list(chain.from_iterable(pairs))
    assert row_N[: offset[-1]] == [rows[w].index(token[pair]) for w in range(num_ranks) for pair in pairs[w]]
    assert len(token_C) == min(len(token), num_tokens * num_ranks)


@pytest.mark.parametrize("sends", [OPS.plan_sends, plan_rows._composed_sends], ids=["native", "composed"])
@pytest.mark.parametrize(
    ("num_tokens", "num_ranks", "per_rank", "top_k"), [(17, 3, 4, 5), (40, 1, 6, 2), (0, 2, 2, 1), (1, 4, 1, 4)]
)
def test_each_token_goes_once_to_each_rank_it_needs(
    sends: Sends, num_tokens: int, num_ranks: int, per_rank: int, top_k: int
) -> None:
    lists, sizes = a_case(num_tokens, num_ranks, per_rank, top_k)
    assert_sends(sends(*lists, *sizes), lists, sizes)


@pytest.mark.parametrize("sends", [OPS.plan_sends, plan_rows._composed_sends], ids=["native", "composed"])
def test_experts_without_pairs_may_share_a_place_with_another(sends: Sends) -> None:
    """As those do by which a node's list of experts is filled up."""
    (token_N, offset_E1, rank_E, local_E, bad_1), sizes = a_case(17, 3, 4, 5)
    filled_E1 = torch.cat((offset_E1, offset_E1[-1:].expand(2)))
    filled = (functional.pad(rank_E, (0, 2)), functional.pad(local_E, (0, 2)))
    lists = (token_N, filled_E1, *filled, bad_1)
    assert_sends(sends(*lists, *sizes), lists, sizes)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99))
def test_any_choice(num_tokens: int, num_ranks: int, per_rank: int, top_k: int, seed: int) -> None:
    lists, sizes = a_case(num_tokens, num_ranks, per_rank, top_k, seed, extra=seed % 3)
    for sends in (OPS.plan_sends, plan_rows._composed_sends):
        assert_sends(sends(*lists, *sizes), lists, sizes)


class Waits(TorchDispatchMode):
    """Notes operators that on an accelerator make the host wait, or copy from its pageable memory."""

    BLOCKING = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in self.BLOCKING:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_composed_plans_wait_for_nothing() -> None:
    """What accelerators run. Mutation: a tensor made of a list, or a number read back, is found."""
    lists, sizes = a_case(17, 3, 4, 5)
    sent = plan_rows._composed_sends(*lists, *sizes)
    row_P = torch.zeros(int(sent[3][1, 2:].sum()), dtype=torch.int32)
    with Waits() as waits:
        plan_rows._composed_sends(*lists, *sizes)
        plan_rows._composed_receives(row_P, sent[3][1:2], 4)
    assert waits.found == []
    with Waits() as waits:
        lists[2].new_tensor([-1])
        lists[2].max().item()
    assert len(waits.found) == 2


def test_wrong_sends_are_told_apart() -> None:
    lists, sizes = a_case(17, 3, 4, 5)
    found = OPS.plan_sends(*lists, *sizes)
    assert_sends(found, lists, sizes)
    for idx, tensor in enumerate(found):
        wrong = list(found)
        wrong[idx] = tensor.flip(0) if idx else tensor + 1
        with pytest.raises(AssertionError):
            assert_sends(tuple(wrong), lists, sizes)


def exchanged(num_ranks: int, per_rank: int, here: int) -> tuple[Tensor, Tensor, list[tuple[int, int, int, int]]]:
    """What rank ``here`` receives: rows, counts, and (local expert, source, pair at the source, row) of each pair."""
    rows, counts, pairs, first_row = [], [], [], 0
    for source in range(num_ranks):
        lists, sizes = a_case(9 + source, num_ranks, per_rank, 2, seed=source)
        _, pair_N, row_N, counts_WK = OPS.plan_sends(*lists, *sizes)
        before = int(counts_WK[:here, 2:].sum())
        mine = slice(before, before + int(counts_WK[here, 2:].sum()))
        expert_of = torch.repeat_interleave(torch.arange(per_rank), counts_WK[here, 2:]).tolist()
        for expert, pair, row in zip(expert_of, pair_N[mine].tolist(), row_N[mine].tolist(), strict=True):
            pairs.append((expert, source, pair, first_row + row))
        rows.append(row_N[mine])
        counts.append(counts_WK[here])
        first_row += int(counts_WK[here, 0])
    return torch.cat(rows), torch.stack(counts), pairs


@pytest.mark.parametrize("receives", [OPS.plan_receives, plan_rows._composed_receives], ids=["native", "composed"])
@pytest.mark.parametrize(("num_ranks", "per_rank", "here"), [(3, 4, 1), (1, 5, 0), (4, 1, 3), (2, 0, 0)])
def test_received_pairs_are_grouped_by_expert_then_source(
    receives: Callable[..., tuple[Tensor, ...]], num_ranks: int, per_rank: int, here: int
) -> None:
    row_P, counts_WK, pairs = exchanged(num_ranks, per_rank, here)
    pair_P, placed_P, offset_e1 = receives(row_P, counts_WK, per_rank)
    order = sorted(range(len(pairs)), key=lambda place: pairs[place][:3])
    assert pair_P.tolist() == order
    assert placed_P.tolist() == [pairs[place][3] for place in order]
    assert offset_e1.tolist() == [sum(pair[0] < expert for pair in pairs) for expert in range(per_rank + 1)]
    assert pair_P.dtype == placed_P.dtype == offset_e1.dtype == torch.int32
    if num_ranks > 1 and per_rank > 1:  # sources really interleave: the order that came would be wrong
        assert order != sorted(order)


def test_wrong_arguments_are_named() -> None:
    lists, sizes = a_case(5, 2, 2, 1)
    token_N, offset_E1, rank_E, local_E, bad_1 = lists
    with pytest.raises(TypeError, match="plan_sends: token must be Int, got Long"):
        OPS.plan_sends(token_N.long(), offset_E1, rank_E, local_E, bad_1, *sizes)
    with pytest.raises(ValueError, match=r"plan_sends: rank must be \[E\] = \[4\], got \[3\]"):
        OPS.plan_sends(token_N, offset_E1, rank_E[:3], local_E, bad_1, *sizes)
    with pytest.raises(
        ValueError, match=r"expert 3 must be on a rank in \[0, 2\) and one of its 2 experts, got rank 2"
    ):
        OPS.plan_sends(token_N, offset_E1, ints([0, 1, 0, 2]), local_E, bad_1, *sizes)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\), got 5 at position 0"):
        OPS.plan_sends(ints([5, *token_N.tolist()[1:]]), offset_E1, rank_E, local_E, bad_1, *sizes)
    with pytest.raises(ValueError, match="offset must ascend from 0, got 9 before"):
        OPS.plan_sends(token_N, ints([0, 9, *offset_E1.tolist()[2:]]), rank_E, local_E, bad_1, *sizes)
    with pytest.raises(ValueError, match="offset must begin at 0 and end at most at 2"):
        OPS.plan_sends(token_N[:2], offset_E1, rank_E, local_E, bad_1, *sizes)
    row_P, counts_WK, _ = exchanged(2, 2, 0)
    with pytest.raises(ValueError, match=r"counts announce \d+ pairs, but \d+ came; give the counts of the same"):
        plan_receives(row_P[1:], counts_WK, 2)
    with pytest.raises(ValueError, match=r"counts must be \[W, K\] with K at least 2 \+ num_local = 5"):
        plan_receives(row_P, counts_WK, 3)


def test_the_front_door_takes_names() -> None:
    lists, (num_tokens, num_ranks, max_local) = a_case(17, 3, 4, 5)
    found = plan_sends(*lists, num_tokens=num_tokens, num_ranks=num_ranks, max_local=max_local)
    assert_sends(found, lists, (num_tokens, num_ranks, max_local))


def test_registration() -> None:
    lists, sizes = a_case(7, 2, 2, 2)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")  # tails are unwritten: values may differ
    torch.library.opcheck(OPS.plan_sends.default, (*lists, *sizes), test_utils=checks[:2])
    row_P, counts_WK, _ = exchanged(2, 2, 0)
    torch.library.opcheck(OPS.plan_receives.default, (row_P, counts_WK, 2), test_utils=checks)
