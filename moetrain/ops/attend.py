"""Attention of ranges of queries to ranges of keys, part by part.

Shapes: Q queries of H heads, K keys of G heads, d elements of a head, S segments.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS


def attend(
    q_QHd: Tensor,
    k_KGd: Tensor,
    v_KGd: Tensor,
    range_q_S2: Tensor,
    range_k_S2: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from the queries of each segment to its keys, as a step of what they attend to in all.

    Keys of one query may come in any number of calls: softmax is over all that were seen so far, by the log-sum-exp of
    their scores (FlashAttention, 2205.14135; over ranks, Ring Attention, 2310.01889). Two parts of a sequence, of which
    the later one sees all of the earlier one, and itself causally:

        key      0 1 2 | 3 4 5
        query 3  x x x | x .       attend(q, k, v, [[3, 6]], [[0, 3]], causal=False)
              4  x x x | x x .     attend(q, k, v, [[0, 3], [3, 6]], [[0, 3], [3, 6]], causal=True, out=out, lse=lse)
              5  x x x | x x x

    Sums run in at least fp32 and in one order, whatever the number of threads: each segment and key head is one task.
    Has no gradient of its own: ``attend_backward`` gives one once all keys were seen.

    Args:
        q_QHd: bf16, fp16, fp32 or fp64; d contiguous, any other strides.
        k_KGd: of q's dtype; G divides H, and query head h reads key head h // (H / G).
        v_KGd: likewise.
        range_q_S2: int32 on the CPU, begin and end of each segment's queries; any lengths, 0 too. No two segments share
            queries.
        range_k_S2: of its keys, which segments may share.
        causal: segments are square, and query i of one sees its keys up to i; else all of its keys.
        scale: of the scores; 1 / sqrt(d) if left out.
        out: to be continued in place, at least fp32; begun anew if left out.
        lse: likewise; given if ``out`` is.

    Returns:
        ``out`` [Q, H, d] and the log-sum-exp [H, Q] of the scores, both of at least fp32. A query that has seen nothing
        has 0 and -inf; one in no segment keeps what it had.

    Raises:
        ValueError: a shape, stride, device or range is wrong, or only one of ``out`` and ``lse`` is given.
        TypeError: a dtype is wrong.
        RuntimeError: a gradient would be lost.
    """
    refuse_gradients("attend", q_QHd, k_KGd, v_KGd)
    if (out is None) != (lse is None):
        raise ValueError(f"attend: out and lse must be given together, got only {'lse' if out is None else 'out'}")
    _check_shape("attend", q_QHd)
    if out is None or lse is None:
        sums = torch.promote_types(q_QHd.dtype, torch.float32)
        out = q_QHd.new_zeros(q_QHd.shape, dtype=sums)
        lse = q_QHd.new_full((q_QHd.shape[1], q_QHd.shape[0]), float("-inf"), dtype=sums)
    OPS.attend_(out, lse, q_QHd, k_KGd, v_KGd, range_q_S2, range_k_S2, causal, _scale(q_QHd, scale))
    return out, lse


def attend_backward(
    dout_QHd: Tensor,
    q_QHd: Tensor,
    k_KGd: Tensor,
    v_KGd: Tensor,
    out: Tensor,
    lse: Tensor,
    range_q_S2: Tensor,
    range_k_S2: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add the gradients of one call of ``attend`` to ``dq``, ``dk`` and ``dv``.

    The calls may come in any order. Segments that share keys are added one after the other, so that no bit depends on
    threads.

    Args:
        dout_QHd: gradient of the final ``out``, of q's dtype.
        q_QHd: as ``attend`` had it.
        k_KGd: likewise.
        v_KGd: likewise.
        range_q_S2: likewise.
        range_k_S2: likewise.
        causal: likewise.
        scale: likewise.
        out: the final one, after all calls.
        lse: likewise.
        dq: [Q, H, d], of at least fp32.
        dk: [K, G, d], likewise.
        dv: likewise.

    Raises:
        ValueError: a shape, stride, device or range is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: a second derivative would be lost.
    """
    refuse_gradients("attend_backward", dout_QHd, q_QHd, k_KGd, v_KGd)
    _check_shape("attend_backward", q_QHd)
    OPS.attend_backward_(
        dq,
        dk,
        dv,
        dout_QHd,
        q_QHd,
        k_KGd,
        v_KGd,
        out,
        lse,
        range_q_S2,
        range_k_S2,
        causal,
        _scale(q_QHd, scale),
    )


@torch.library.register_fake("moetrain::check_attend")
@torch.library.register_fake("moetrain::check_attend_backward")
@torch.library.register_fake("moetrain::attend_")
@torch.library.register_fake("moetrain::attend_backward_")
def _make_nothing(*args: Any) -> None:
    """Results are written, or added to, where they are."""


def refuse_gradients(op: str, *tensors: Tensor) -> None:
    """Refuse what autograd would pass over in silence.

    Raises:
        RuntimeError: gradients are recorded, and one of the tensors wants its own.
    """
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        raise RuntimeError(
            f"{op}: records no gradient, but one of its inputs wants one; call it in the forward or backward of a "
            "torch.autograd.Function, or under torch.no_grad()"
        )


def _check_shape(op: str, q_QHd: Tensor) -> None:
    """Before anything is made of it: its elements set the scale."""
    if q_QHd.dim() != 3 or q_QHd.shape[2] < 1:
        raise ValueError(f"{op}: q must be [Q, H, d] with d of at least 1, got {list(q_QHd.shape)}")


def _scale(q_QHd: Tensor, scale: float | None) -> float:
    return q_QHd.shape[-1] ** -0.5 if scale is None else scale
