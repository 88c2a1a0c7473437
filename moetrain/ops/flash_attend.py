"""attend on CUDA tensors, by torch's FlashAttention over segments of any lengths. Shapes as in ``moetrain.ops.attend``.

Segments without queries or keys are left out: the kernel's log-sum-exp of no keys is +inf.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS

FORWARD: Callable[..., tuple[Tensor, ...]] = torch.ops.aten._flash_attention_forward
BACKWARD: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True, slots=True)
class Segments:
    """Tokens of all segments that have queries and keys, one segment after the other, and where each begins."""

    ranges_k: list[tuple[int, int]]
    query_N: Tensor
    key_M: Tensor
    lengths: tuple[Tensor, Tensor, int, int]  # cum_seq_q, cum_seq_k, max_q, max_k

    @classmethod
    def of(cls, range_q_S2: Tensor, range_k_S2: Tensor, device: torch.device) -> "Segments | None":
        """List segments of ranges on the CPU for the device; None where there are none to list."""
        both = zip(range_q_S2.tolist(), range_k_S2.tolist(), strict=True)
        kept = [(q, k) for q, k in both if q[0] < q[1] and k[0] < k[1]]
        if not kept:
            return None
        ranges_q, ranges_k = ([(begin, end) for begin, end in of] for of in zip(*kept, strict=True))
        (cum_q, max_q), (cum_k, max_k) = (_lengths(of, device) for of in (ranges_q, ranges_k))
        return cls(ranges_k, _tokens(ranges_q, device), _tokens(ranges_k, device), (cum_q, cum_k, max_q, max_k))


def _tokens(ranges: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(*one, device=device) for one in ranges])


def _lengths(ranges: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, int]:
    lengths = [end - begin for begin, end in ranges]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(lengths)


def _check_dtype(q_QHd: Tensor) -> None:
    if q_QHd.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"attend: q must be fp16 or bf16 on {q_QHd.device.type}, which FlashAttention takes, got {q_QHd.dtype}; "
            "convert q, k and v, or attend on the CPU"
        )


def flash_attend_(out_QHd: Tensor, lse_HQ: Tensor, *args: Any) -> None:
    """Continue ``out`` and ``lse`` by what FlashAttention gives for all segments: ``moetrain::attend_``.

    Raises:
        ValueError, TypeError: as ``attend`` says, or FlashAttention does not take the dtype.
    """
    OPS.check_attend(out_QHd, lse_HQ, *args)
    q_QHd, k_KGd, v_KGd, range_q_S2, range_k_S2, causal, scale = args
    _check_dtype(q_QHd)
    if (of := Segments.of(range_q_S2, range_k_S2, q_QHd.device)) is None:
        return
    inputs = q_QHd[of.query_N], k_KGd[of.key_M], v_KGd[of.key_M]
    y_NHd, now_HN, *_ = FORWARD(*inputs, *of.lengths, 0.0, causal, False, scale=scale)
    before_HN = lse_HQ[:, of.query_N]
    both_HN = torch.logaddexp(before_HN, now_HN)
    old_NH1, new_NH1 = ((part - both_HN).exp().T[..., None] for part in (before_HN, now_HN))
    out_QHd[of.query_N] = old_NH1 * out_QHd[of.query_N] + new_NH1 * y_NHd
    lse_HQ[:, of.query_N] = both_HN


def flash_attend_backward_(dq_QHd: Tensor, dk_KGd: Tensor, dv_KGd: Tensor, dout_QHd: Tensor, *args: Any) -> None:
    """Add FlashAttention's gradients, which are of q's dtype: ``moetrain::attend_backward_``.

    Those of keys are added segment by segment, as segments may share keys.

    Raises:
        ValueError, TypeError: as ``attend_backward`` says, or FlashAttention does not take the dtype.
    """
    OPS.check_attend_backward(dq_QHd, dk_KGd, dv_KGd, dout_QHd, *args)
    q_QHd, k_KGd, v_KGd, out_QHd, lse_HQ, range_q_S2, range_k_S2, causal, scale = args
    _check_dtype(q_QHd)
    if (of := Segments.of(range_q_S2, range_k_S2, q_QHd.device)) is None:
        return
    inputs = dout_QHd[of.query_N], q_QHd[of.query_N], k_KGd[of.key_M], v_KGd[of.key_M]
    seen = out_QHd[of.query_N].to(q_QHd.dtype), lse_HQ[:, of.query_N].contiguous()
    no_dropout = q_QHd.new_empty(2, dtype=torch.uint64), q_QHd.new_empty(0)
    dq_NHd, dk_MGd, dv_MGd = BACKWARD(*inputs, *seen, *of.lengths, 0.0, causal, *no_dropout, scale=scale)
    dq_QHd[of.query_N] += dq_NHd
    start = 0
    for begin, end in of.ranges_k:
        dk_KGd[begin:end] += dk_MGd[start : start + end - begin]
        dv_KGd[begin:end] += dv_MGd[start : start + end - begin]
        start += end - begin


torch.library.impl("moetrain::attend_", "CUDA", flash_attend_)
torch.library.impl("moetrain::attend_backward_", "CUDA", flash_attend_backward_)
