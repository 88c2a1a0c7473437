"""attend against its definition: rectangles and squares, begun and continued, and a causal call taken in parts."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from ops.isas import ISAS
from torch import Tensor

from moetrain.ops.attend import attend, attend_backward
from moetrain.ops.causal_attention import causal_attention
from moetrain.ops.native import OPS
from moetrain.ops.reference_attend import attend_reference, seen_by_segments

Ranges = list[tuple[int, int]]
Call = tuple[Ranges, Ranges, bool]


def ranges(of: Ranges) -> Tensor:
    return torch.tensor(of, dtype=torch.int32).view(-1, 2)


def case(
    num_queries: int, num_keys: int, dtype: torch.dtype, *, heads: tuple[int, int] = (4, 2), d: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give q, k, v and the gradient of out."""
    random = torch.Generator().manual_seed(num_queries + num_keys)
    sizes = [(num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]), (num_queries, heads[0])]
    q, k, v, dout = (torch.randn(*size, d, generator=random, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k, v, dout


def run(calls: list[Call], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """All calls forward, each continuing the one before, then all backward: out, dq, dk, dv, lse."""
    out = lse = None
    for range_q, range_k, causal in calls:
        out, lse = attend(q, k, v, ranges(range_q), ranges(range_k), causal=causal, out=out, lse=lse)
    assert out is not None
    assert lse is not None
    dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
    for range_q, range_k, causal in calls:
        attend_backward(dout, q, k, v, out, lse, ranges(range_q), ranges(range_k), causal=causal, dq=dq, dk=dk, dv=dv)
    return [out, dq, dk, dv, lse]


def define(calls: list[Call], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Take the definition's values and gradients, in the dtype of q."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for range_q, range_k, causal in calls:
        seen |= seen_by_segments(len(q), len(k), ranges(range_q), ranges(range_k), causal=causal)
    q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend_reference(q, k, v, seen)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype)), lse.detach()]


def check(got: list[Tensor], calls: list[Call], *tensors: Tensor) -> None:
    """At most twice plain torch's largest error in the same dtype, plus a few roundings of the sums."""
    eps = torch.finfo(got[0].dtype).eps
    exact, plain = define(calls, *(x.double() for x in tensors)), define(calls, *tensors)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        seen = want.isfinite()
        assert torch.equal(ours.isfinite(), seen)
        least = 32 * eps * max(1.0, float(want[seen].abs().max()))
        error = (ours.double() - want)[seen].abs().max()
        assert error <= 2 * (theirs.double() - want)[seen].abs().max() + least


def zigzag(size: int, num_ranks: int) -> list[Call]:
    """Cut a causal square in 2d parts at p n / 2d: each part sees itself causally, and the earlier ones whole."""
    cuts = [p * size // (2 * num_ranks) for p in range(2 * num_ranks + 1)]
    parts = list(pairwise(cuts))
    squares: list[Call] = [(parts, parts, True)]
    return squares + [([late], [early], False) for i, late in enumerate(parts) for early in parts[:i]]


MIXED: list[Call] = [
    ([(0, 70), (70, 70), (100, 230)], [(5, 135), (0, 3), (40, 41)], False),
    ([(75, 100), (3, 3), (230, 240)], [(0, 25), (9, 9), (130, 140)], True),
    ([(2, 60)], [(140, 150)], False),
    ([(70, 75)], [(8, 8)], False),
]  # queries 70 to 75 see nothing; the keys of the first call's first and third segments overlap


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", isa)
    for heads, d in (((4, 2), 16), ((3, 1), 33)):
        tensors = case(245, 150, dtype, heads=heads, d=d)
        check(run(MIXED, *tensors), MIXED, *tensors)


def test_a_key_more_or_less_is_noticed() -> None:
    tensors = case(245, 150, torch.float32)
    for wrong in (([(2, 60)], [(140, 149)], False), ([(2, 61)], [(140, 150)], False)):
        with pytest.raises(AssertionError):
            check(run([*MIXED[:2], wrong], *tensors), MIXED, *tensors)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [1, 7, 101, 300])
def test_parts_make_up_one_causal_call(size: int, num_ranks: int) -> None:
    tensors = case(size, size, torch.float64)
    whole = run([([(0, size)], [(0, size)], True)], *tensors)
    for calls in (zigzag(size, num_ranks), zigzag(size, num_ranks)[::-1]):
        for got, want in zip(run(calls, *tensors), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_lost_part_is_noticed() -> None:
    tensors = case(101, 101, torch.float64)
    whole, parts = run([([(0, 101)], [(0, 101)], True)], *tensors), run(zigzag(101, 3)[:-1], *tensors)
    assert all((got - want).abs().max() > 1e-3 for got, want in zip(parts, whole, strict=True))


def test_the_local_lse_is_noticed() -> None:
    """Backward needs the lse of all keys: with that of one call's keys, gradients are wrong."""
    q, k, v, dout = case(60, 120, torch.float64)
    calls: list[Call] = [([(0, 60)], [(0, 60)], False), ([(0, 60)], [(60, 120)], True)]
    out, *want, _ = run(calls, q, k, v, dout)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for range_q, range_k, causal in calls:
        ends = ranges(range_q), ranges(range_k)
        _, local = attend(q, k, v, *ends, causal=causal)
        attend_backward(dout, q, k, v, out, local, *ends, causal=causal, dq=dq, dk=dk, dv=dv)
    for wrong, right in zip((dq, dk, dv), want, strict=True):
        assert (wrong - right).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_square_is_causal_attention(dtype: torch.dtype) -> None:
    """One kernel; the merge with nothing, and sums added to 0, may round once more."""
    q, k, v, dout = case(170, 170, dtype)
    whole: Call = ([(0, 170)], [(0, 170)], True)
    out, dq, dk, dv, _ = run([whole], q, k, v, dout)
    q, k, v = leaves = [x.requires_grad_() for x in (q, k, v)]
    y = causal_attention(q, k, v, torch.zeros(170, dtype=torch.int32), torch.tensor([0, 170], dtype=torch.int32))
    want = [y, *torch.autograd.grad(y, leaves, dout)]
    for ours, theirs in zip((out, dq, dk, dv), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_threads_and_strides_change_no_bit() -> None:
    q, k, v, dout = case(245, 150, torch.bfloat16)
    want = run(MIXED, q, k, v, dout)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            wide = [torch.cat((x, x), dim=-1)[..., : x.shape[-1]] for x in (q, k, v, dout)]
            heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, dout)]
            for tensors in (wide, heads_first):
                assert all(torch.equal(a, b) for a, b in zip(run(MIXED, *tensors), want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_what_sees_nothing_keeps_what_it_had() -> None:
    q, k, v, dout = case(8, 4, torch.float32)
    out, lse = attend(q, k, v, ranges([(2, 4), (5, 6)]), ranges([(0, 4), (3, 3)]), causal=False)
    unseen = [0, 1, 4, 5, 6, 7]
    assert not out[unseen].any()
    assert (lse[:, unseen] == float("-inf")).all()
    assert lse[:, 2:4].isfinite().all()
    before = out.clone(), lse.clone()
    attend(q, k, v, ranges([(0, 0), (2, 4)]), ranges([(0, 4), (1, 1)]), causal=False, out=out, lse=lse)
    assert torch.equal(out, before[0])
    assert torch.equal(lse, before[1])
    dq, dk, dv = (torch.full_like(x, 3.0) for x in (q, k, v))
    attend_backward(dout, q, k, v, out, lse, ranges([(5, 6)]), ranges([(3, 3)]), causal=False, dq=dq, dk=dk, dv=dv)
    assert all((x == 3).all() for x in (dq, dk, dv))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_no_tokens_and_no_segments(sizes: tuple[int, int]) -> None:
    tensors = case(*sizes, torch.float32)
    none: Call = ([], [], False)
    empty: Call = ([(0, sizes[0])], [(0, sizes[1])], False)
    for call in (none, empty):
        got = run([call], *tensors)
        assert not any(x.any() for x in got[:4])


def test_opcheck() -> None:
    q, k, v, dout = case(9, 9, torch.float32)
    ends = ranges([(0, 4), (4, 9)]), ranges([(0, 4), (4, 9)])
    out, lse = attend(q, k, v, *ends, causal=True)
    torch.library.opcheck(OPS.attend_, (out.clone(), lse.clone(), q, k, v, *ends, True, 0.5))
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    torch.library.opcheck(OPS.attend_backward_, (*sums, dout, q, k, v, out, lse, *ends, True, 0.5))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a | {"q_QHd": a["q_QHd"][0]}, ValueError, r"q must be \[Q, H, d\]"),
        (lambda a: a | {"q_QHd": a["q_QHd"][..., :0]}, ValueError, r"with d of at least 1, got \[6, 4, 0\]"),
        (lambda a: a | {"k_KGd": a["k_KGd"].double()}, TypeError, "k must be Float"),
        (lambda a: a | {"v_KGd": a["v_KGd"][:4]}, ValueError, r"v must be \[tokens, heads, d\]"),
        (lambda a: a | {"q_QHd": a["q_QHd"][:, :3]}, ValueError, r"heads of q \(3\) must be a multiple"),
        (lambda a: a | {"range_q_S2": a["range_q_S2"].long()}, TypeError, "range_q must be Int"),
        (lambda a: a | {"range_q_S2": ranges([(0, 9)])}, ValueError, r"range_q\[0\] must be a range within Q = 6"),
        (lambda a: a | {"range_k_S2": ranges([(3, 2)])}, ValueError, r"range_k\[0\] must be a range within K = 6"),
        (lambda a: a | {"range_k_S2": ranges([(0, 2)])}, ValueError, r"as many keys as queries, got 6 queries and 2"),
        (
            lambda a: a | {"range_q_S2": ranges([(0, 4), (3, 6)]), "range_k_S2": ranges([(0, 4), (3, 6)])},
            ValueError,
            "segments must not share queries, got 0 to 4 and 3 to 6",
        ),
        (lambda a: a | {"out": a["q_QHd"].clone()}, ValueError, "out and lse must be given together, got only out"),
        (lambda a: a | {"q_QHd": a["q_QHd"].requires_grad_()}, RuntimeError, "records no gradient"),
    ],
)
def test_errors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], error: type[Exception], text: str) -> None:
    q, k, v, _ = case(6, 6, torch.float32)
    whole = ranges([(0, 6)])
    given = {"q_QHd": q, "k_KGd": k, "v_KGd": v, "range_q_S2": whole, "range_k_S2": whole}
    with pytest.raises(error, match=text):
        attend(**change(given), causal=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a | {"dout_QHd": a["dout_QHd"].bfloat16()}, TypeError, "attend_backward: dout must be Float"),
        (lambda a: a | {"out": a["out"][:5]}, ValueError, r"attend_backward: out must be \[tokens, heads, d\]"),
        (lambda a: a | {"lse": a["lse"].T}, ValueError, r"attend_backward: lse must be \[H, Q\]"),
        (lambda a: a | {"dq": a["dq"].half()}, TypeError, "attend_backward: dq must be Float"),
        (lambda a: a | {"dk": a["dk"][:, :1]}, ValueError, r"attend_backward: dk must be \[tokens, heads, d\]"),
        (lambda a: a | {"dv": a["dv"].double()}, TypeError, "attend_backward: dv must be Float"),
        (lambda a: a | {"range_k_S2": ranges([(0, 7)])}, ValueError, r"attend_backward: range_k\[0\] must be a range"),
        (lambda a: a | {"dout_QHd": a["dout_QHd"].requires_grad_()}, RuntimeError, "attend_backward: records no"),
    ],
)
def test_errors_of_backward(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], error: type[Exception], text: str
) -> None:
    q, k, v, dout = case(6, 6, torch.float32)
    whole = ranges([(0, 6)])
    out, lse = attend(q, k, v, whole, whole, causal=True)
    given = {"dout_QHd": dout, "q_QHd": q, "k_KGd": k, "v_KGd": v, "out": out, "lse": lse}
    given |= {"range_q_S2": whole, "range_k_S2": whole}
    given |= {name: torch.zeros_like(x) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    with pytest.raises(error, match=text):
        attend_backward(**change(given), causal=True)  # type: ignore[arg-type]
    for name in ("dq", "dk", "dv"):
        assert not given[name].any(), "nothing is added before all is checked"
