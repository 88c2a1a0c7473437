"""causal_attention against its definition, on every instruction set that this machine has."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isas import ISAS
from torch import Tensor
from torch.autograd import gradcheck

from moetrain.ops.causal_attention import causal_attention
from moetrain.ops.native import OPS
from moetrain.ops.reference_causal_attention import causal_attention_reference

SHAPES = [  # rows, tokens of each, heads, key heads, elements of a head
    (2, 7, 2, 1, 4),
    (1, 130, 4, 2, 16),
    (1, 200, 2, 1, 32),
    (1, 97, 1, 1, 80),
    (1, 70, 2, 2, 33),
    (2, 1, 2, 2, 64),
]


def _first(lengths: list[int], size: int) -> Tensor:
    """Index of the first token of each token's document; the last document takes what is left."""
    first, start = torch.zeros(size, dtype=torch.int32), 0
    for length in lengths:
        first[start : start + length] = start
        start += length
    first[start:] = start
    return first


def _case(
    shape: tuple[int, ...], dtype: torch.dtype, *, lengths: list[int] | None = None, seed: int = 0
) -> tuple[Tensor, ...]:
    """Rows of one length, and of the same documents each."""
    num_rows, size, heads, key_heads, head_dim = shape
    random = torch.Generator().manual_seed(seed)
    q, k, v, dy = (
        torch.randn(num_rows * size, n, head_dim, generator=random, dtype=torch.float64).to(dtype)
        for n in (heads, key_heads, key_heads, heads)
    )
    offset = size * torch.arange(num_rows + 1, dtype=torch.int32)
    return q, k, v, dy, (_first(lengths or [], size) + offset[:-1, None]).flatten(), offset


def _run(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dy: Tensor, first: Tensor, *offset: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attend(*leaves, first, *offset)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _check(got: list[Tensor], q: Tensor, k: Tensor, v: Tensor, dy: Tensor, first: Tensor, _: Tensor) -> None:
    """At most twice the largest error of plain torch in the same dtype, plus a few roundings of unit-scale sums."""
    exact = _run(causal_attention_reference, q.double(), k.double(), v.double(), dy.double(), first)
    plain = _run(causal_attention_reference, q, k, v, dy, first)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        allowed = 2 * (theirs.double() - want).abs().max() + 16 * torch.finfo(q.dtype).eps * max(
            1.0, float(want.abs().max())
        )
        assert (ours.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", isa)
    for shape in SHAPES:
        size = shape[1]
        for lengths in ([], [size // 3, size // 2, 1]):
            case = _case(shape, dtype, lengths=lengths)
            _check(_run(causal_attention, *case), *case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((1, 193, 3, 1, 8), [63, 1, 65]),  # steps and blocks that end in the middle, documents at both sides of a block
        ((1, 129, 8, 1, 32), [1, 1, 127]),
        ((2, 260, 2, 2, 32), [30, 100, 66]),  # several documents within one block of queries
        ((1, 101, 2, 1, 256), [96]),
        ((1, 66, 2, 1, 48), []),
        ((1, 1, 3, 1, 8), []),
    ],
)
def test_documents_across_blocks(
    monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, shape: tuple[int, ...], lengths: list[int]
) -> None:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", isa)
    case = _case(shape, dtype, lengths=lengths)
    _check(_run(causal_attention, *case), *case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_grow_along_a_row(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype) -> None:
    """The largest score moves by little and by much from block to block, so that sums are and are not rescaled."""
    monkeypatch.setenv("MOETRAIN_CPU_ISA", isa)
    q, k, v, dy, first, offset = _case((1, 300, 2, 1, 16), dtype)
    for steepness in (0.02, 0.2, -0.2):
        ramp = steepness * torch.arange(300)[:, None, None]
        case = (torch.ones_like(q), (k + ramp / 4).to(dtype), v, dy, first, offset)
        _check(_run(causal_attention, *case), *case)


def test_seeing_one_key_too_many_is_noticed() -> None:
    q, k, v, dy, first, offset = _case((1, 130, 2, 2, 16), torch.float32, lengths=[64, 20])
    wrong = first.clone()
    wrong[64:84] = 63
    with pytest.raises(AssertionError):
        _check(_run(causal_attention, q, k, v, dy, wrong, offset), q, k, v, dy, first, offset)


def test_other_documents_cannot_poison() -> None:
    q, k, v, dy, first, offset = _case((1, 150, 2, 1, 32), torch.float32, lengths=[70])
    clean = _run(causal_attention, q, k, v, dy, first, offset)
    for x in (k, v):
        x[:70] = 1e30
    got = _run(causal_attention, q, k, v, dy, first, offset)
    for ours, want in zip(got, clean, strict=True):
        assert torch.equal(ours[70:], want[70:])
    assert _run(causal_attention, q * float("nan"), k, v, dy, first, offset)[0][70:].isnan().all()


def test_strides_and_threads_change_no_bit() -> None:
    q, k, v, dy, first, offset = _case((3, 120, 4, 2, 16), torch.bfloat16, lengths=[50])
    want = _run(causal_attention, q, k, v, dy, first, offset)
    wide = [torch.cat((x, x), dim=-1)[..., : x.shape[-1]] for x in (q, k, v)]
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for query, key, value in (wide, heads_first):
                got = _run(causal_attention, query, key, value, dy, first, offset)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    case = _case(shape, torch.float32)
    got = _run(causal_attention, *case)
    assert [x.shape for x in got] == [case[i].shape for i in (0, 0, 1, 2)]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 140),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(1, 70),
    st.lists(st.integers(1, 60), max_size=5),
    st.integers(0, 99),
)
def test_any_shape(size: int, heads: tuple[int, int], head_dim: int, lengths: list[int], seed: int) -> None:
    case = _case((1, size, *heads, head_dim), torch.float32, lengths=lengths, seed=seed)
    _check(_run(causal_attention, *case), *case)


def test_gradcheck_and_opcheck() -> None:
    q, k, v, _, first, offset = _case((1, 9, 2, 1, 3), torch.float64, lengths=[4])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert gradcheck(lambda q, k, v: causal_attention(q, k, v, first, offset), leaves)
    torch.library.opcheck(OPS.causal_attention, (*leaves, first, offset, 0.5))


def test_compiles_whole() -> None:
    q, k, v, _, first, offset = _case((1, 9, 2, 1, 4), torch.float32)
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(q, k, v, first, offset), causal_attention(q, k, v, first, offset), rtol=0, atol=0
    )


def test_rows_of_any_lengths_are_as_each_alone() -> None:
    """Empty ones too; and what is in one row may be in several, between documents, but for the order of sums."""
    q, k, v, dy, first, _ = _case((1, 200, 4, 2, 16), torch.float64, lengths=[3, 97, 1])
    for borders in ([0, 3, 3, 100, 200], [0, 0, 101, 200, 200], [0, 3, 100, 101, 200]):
        offset = torch.tensor(borders, dtype=torch.int32)
        _check(_run(causal_attention, q, k, v, dy, first, offset), q, k, v, dy, first, offset)
        together = _run(causal_attention, q, k, v, dy, first, offset)
        for begin, end in pairwise(borders):
            part = [x[begin:end] for x in (q, k, v, dy)]
            alone = _run(causal_attention, *part, first[begin:end] - begin, torch.tensor([0, end - begin]).int())
            assert all(torch.equal(a, b[begin:end]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda q, k, v, f, o: (q[0], k, v, f, o), ValueError, r"q must be \[T, H, d\]"),
        (lambda q, k, v, f, o: (q, k.double(), v, f, o), TypeError, "k must have the dtype of q"),
        (lambda q, k, v, f, o: (q, k, v[:4], f, o), ValueError, r"v must be \[T, heads, d\]"),
        (
            lambda q, k, v, f, o: (q[:, :3], k, v, f, o),
            ValueError,
            r"the heads of q \(3\) must be a multiple of those of k",
        ),
        (lambda q, k, v, f, o: (q, k, v, f.long(), o), TypeError, "first must be Int"),
        (lambda q, k, v, f, o: (q, k, v, f, o.long()), TypeError, "offset must be Int"),
        (lambda q, k, v, f, o: (q, k, v, f, o[:0]), ValueError, r"offset must be \[R \+ 1\]"),
        (lambda q, k, v, f, o: (q, k, v, f, o + 1), ValueError, "offset must go from 0 to T = 6, got 1 to 7"),
        (
            lambda q, k, v, f, o: (q, k, v, f, torch.tensor([0, 5, 3, 6]).int()),
            ValueError,
            "offset must ascend, got 5 before 3 for row 1",
        ),
        (lambda q, k, v, f, o: (q, k, v, f + 1, o), ValueError, r"first\[0\] is 1, but must lie between 0 .* and 0"),
        (lambda q, k, v, f, o: (q, k, v, f.flip(0), o), ValueError, r"give the index of the first token"),
        (
            lambda q, k, v, f, o: (q, k, v, f, torch.tensor([0, 4, 6]).int()),
            ValueError,
            r"first\[4\] is 3, but must lie between 4 \(where its row begins\) and 4",
        ),
    ],
)
def test_errors(change: Callable[..., tuple[Any, ...]], error: type[Exception], text: str) -> None:
    q, k, v, _, first, offset = _case((1, 6, 4, 2, 8), torch.float32, lengths=[3])
    with pytest.raises(error, match=text):
        causal_attention(*change(q, k, v, first, offset))
