"""Causal attention inside documents, natively on the CPU.

Shapes: T tokens in R rows of whole documents, H query heads, G key and value heads, d elements of a head.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS, refuse_second_derivative


def causal_attention(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, first_T: Tensor, offset_R1: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend from each token to itself and to the tokens before it in its document.

    Queries are taken in blocks of 96, keys in blocks of 64, with a running softmax (FlashAttention, 2205.14135); scores
    exist for a few queries at a time, and blocks that no query sees are skipped, so that a row of many short documents
    costs what they cost alone. Query head h reads key head h // (H / G) without copies. Sums run in at least fp32 and
    in one order, whatever the number of threads: each row and key head is one task. Differentiable in q, k and v; keeps
    the log of the softmax denominators.

    Args:
        q_THd: bf16, fp16, fp32 or fp64 on the CPU; d contiguous, any other strides.
        k_TGd: of q's dtype; G divides H.
        v_TGd: likewise.
        first_T: int32, index of the first token of each token's document. Never falls, and is in the token's row.
        offset_R1: int32, where rows begin, and T behind the last one. No document crosses from one to the next. Rows
            decide what is computed together, not what is seen: many short documents in one are fastest.
        scale: of the scores; 1 / sqrt(d) if left out.

    Returns:
        ``[T, H, d]`` of q's dtype.

    Raises:
        ValueError: a shape, stride, device or value of ``first_T`` or ``offset_R1`` is wrong.
        TypeError: a dtype is wrong.
    """
    y_THd, _ = OPS.causal_attention(
        q_THd, k_TGd, v_TGd, first_T, offset_R1, q_THd.shape[-1] ** -0.5 if scale is None else scale
    )
    return y_THd


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.register_fake("moetrain::causal_attention")
def _causal_attention_fake(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, first_T: Tensor, offset_R1: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    num_tokens, heads, _ = q_THd.shape
    at_least_fp32 = torch.promote_types(q_THd.dtype, torch.float32)
    return q_THd.new_empty(q_THd.shape), q_THd.new_empty((heads, num_tokens), dtype=at_least_fp32)


@torch.library.register_fake("moetrain::causal_attention_backward")
def _causal_attention_backward_fake(
    dy_THd: Tensor,
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    y_THd: Tensor,
    lse_HT: Tensor,
    first_T: Tensor,
    offset_R1: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THd.new_empty(q_THd.shape), k_TGd.new_empty(k_TGd.shape), v_TGd.new_empty(v_TGd.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_THd, k_TGd, v_TGd, first_T, offset_R1, ctx.scale = inputs
    y_THd, lse_HT = output
    ctx.mark_non_differentiable(lse_HT)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_THd, k_TGd, v_TGd, y_THd, lse_HT, first_T, offset_R1)


def _backward(
    ctx: Any, dy_THd: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
    if dy_THd is None:
        return None, None, None, None, None, None
    dq_THd, dk_TGd, dv_TGd = OPS.causal_attention_backward(_inner_contiguous(dy_THd), *ctx.saved_tensors, ctx.scale)
    return dq_THd, dk_TGd, dv_TGd, None, None, None


torch.library.register_autograd("moetrain::causal_attention", _backward, setup_context=_save)
refuse_second_derivative("causal_attention")
