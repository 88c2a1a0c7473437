"""How attend calls FlashAttention on CUDA tensors: the same code on CPU tensors, over stand-ins for torch's kernels."""

from typing import Any

import pytest
import torch
from ops.test_attend import MIXED, Call, case, ranges, run
from torch import Tensor

from moetrain.ops import flash_attend
from moetrain.ops.attend import attend, attend_backward


def _ranges(cum: Tensor, longest: int) -> Tensor:
    assert cum.dtype == torch.int32
    assert cum[0] == 0
    assert cum.diff().max() == longest
    return torch.stack((cum[:-1], cum[1:]), dim=1).contiguous()


def forward_stand_in(q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float) -> tuple[Tensor, ...]:
    """Take and give what aten::_flash_attention_forward does: out of q's dtype, +inf where a segment has no keys."""
    cum_q, cum_k, max_q, max_k, dropout, causal, debug = args
    assert (dropout, debug) == (0.0, False)
    assert bool((cum_k.diff() > 0).all()), "its log-sum-exp would be +inf"
    out, lse = attend(q, k, v, _ranges(cum_q, max_q), _ranges(cum_k, max_k), causal=causal, scale=scale)
    return out.to(q.dtype), lse, torch.empty(2), torch.empty(0), torch.empty(0)


def backward_stand_in(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float) -> tuple[Tensor, ...]:
    """Likewise for aten::_flash_attention_backward: gradients of the inputs' dtypes."""
    out, lse, cum_q, cum_k, max_q, max_k, _, causal, _, _ = args
    assert out.dtype == q.dtype
    assert lse.is_contiguous()
    sums = dict(zip(("dq", "dk", "dv"), (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)), strict=True))
    ends = _ranges(cum_q, max_q), _ranges(cum_k, max_k)
    attend_backward(dout, q, k, v, out.float(), lse, *ends, causal=causal, scale=scale, **sums)
    return tuple(x.to(q.dtype) for x in sums.values())


def run_flash(calls: list[Call], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    out, lse = torch.zeros(q.shape), torch.full((q.shape[1], len(q)), float("-inf"))
    for range_q, range_k, causal in calls:
        flash_attend.flash_attend_(out, lse, q, k, v, ranges(range_q), ranges(range_k), causal, 0.25)
    sums = [torch.zeros(x.shape) for x in (q, k, v)]
    for range_q, range_k, causal in calls:
        ends = ranges(range_q), ranges(range_k)
        flash_attend.flash_attend_backward_(*sums, dout, q, k, v, out, lse, *ends, causal, 0.25)
    return [out, *sums, lse]


def test_continued_calls_agree_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attend, "FORWARD", forward_stand_in)
    monkeypatch.setattr(flash_attend, "BACKWARD", backward_stand_in)
    tensors = case(245, 150, torch.bfloat16)
    want = run(MIXED, *tensors)  # d = 16: its scale is 0.25
    for got, expected in zip(run_flash(MIXED, *tensors), want, strict=True):
        bound = 2**-7 * float(expected[expected.isfinite()].abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)
    lost = run_flash(MIXED[:1] + MIXED[2:], *tensors)
    assert all(
        (got - expected)[expected.isfinite()].abs().max() > 0.05 for got, expected in zip(lost, want, strict=True)
    )


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="q must be fp16 or bf16 on cpu, which FlashAttention takes"):
        run_flash(MIXED, *case(245, 150, torch.float32))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (([(0, 40), (30, 60)], [(0, 9), (20, 29)], False), "segments must not share queries, got 0 to 40 and 30 to 60"),
        (([(0, 40)], [(0, 41)], True), "as many keys as queries, got 40 queries and 41 keys"),
        (([(0, 246)], [(0, 9)], False), r"range_q\[0\] must be a range within Q = 245"),
    ],
)
def test_what_the_cpu_refuses_is_refused(call: Call, text: str) -> None:
    """FlashAttention would lose one of two writes to a query, or align the mask of a rectangle to its other end."""
    q, k, v, dout = case(245, 150, torch.bfloat16)
    with pytest.raises(ValueError, match=f"attend: .*{text}"):
        run_flash([call], q, k, v, dout)
    range_q, range_k, causal = call
    sums = [torch.zeros(x.shape) for x in (q, k, v)]
    seen = torch.zeros(q.shape), torch.zeros(4, 245)
    with pytest.raises(ValueError, match=f"attend_backward: .*{text}"):
        flash_attend.flash_attend_backward_(*sums, dout, q, k, v, *seen, ranges(range_q), ranges(range_k), causal, 0.25)
