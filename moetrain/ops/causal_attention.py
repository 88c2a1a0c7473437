"""Causal attention inside documents, natively on the CPU.

Shapes: B rows of S tokens, H query heads, G key and value heads, d elements of a head.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS, refuse_second_derivative


def causal_attention(
    q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, first_BS: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend from each token to itself and to the tokens before it in its document.

    Queries are taken in blocks of 96, keys in blocks of 64, with a running softmax (FlashAttention, 2205.14135); scores
    exist for a few queries at a time, and blocks that no query sees are skipped, so that a row of many short documents
    costs what they cost alone. Query head h reads key head h // (H / G) without copies. Sums run in at least fp32 and
    in one order, whatever the number of threads: each row and key head is one task. Differentiable in q, k and v; keeps
    the log of the softmax denominators.

    Args:
        q_BSHd: bf16, fp16, fp32 or fp64 on the CPU; d contiguous, any other strides.
        k_BSGd: of q's dtype; G divides H.
        v_BSGd: likewise.
        first_BS: int32, index in the row of the first token of each token's document. Never falls within a row, and is
            at most the token's own index.
        scale: of the scores; 1 / sqrt(d) if left out.

    Returns:
        ``[B, S, H, d]`` of q's dtype.

    Raises:
        ValueError: a shape, stride, device or value of ``first_BS`` is wrong.
        TypeError: a dtype is wrong.
    """
    y_BSHd, _ = OPS.causal_attention(
        q_BSHd, k_BSGd, v_BSGd, first_BS, q_BSHd.shape[-1] ** -0.5 if scale is None else scale
    )
    return y_BSHd


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.register_fake("moetrain::causal_attention")
def _causal_attention_fake(
    q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, first_BS: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    num_rows, length, heads, _ = q_BSHd.shape
    at_least_fp32 = torch.promote_types(q_BSHd.dtype, torch.float32)
    return q_BSHd.new_empty(q_BSHd.shape), q_BSHd.new_empty((num_rows, heads, length), dtype=at_least_fp32)


@torch.library.register_fake("moetrain::causal_attention_backward")
def _causal_attention_backward_fake(
    dy_BSHd: Tensor,
    q_BSHd: Tensor,
    k_BSGd: Tensor,
    v_BSGd: Tensor,
    y_BSHd: Tensor,
    lse_BHS: Tensor,
    first_BS: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_BSHd.new_empty(q_BSHd.shape), k_BSGd.new_empty(k_BSGd.shape), v_BSGd.new_empty(v_BSGd.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BSHd, k_BSGd, v_BSGd, first_BS, ctx.scale = inputs
    y_BSHd, lse_BHS = output
    ctx.mark_non_differentiable(lse_BHS)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_BSHd, k_BSGd, v_BSGd, y_BSHd, lse_BHS, first_BS)


def _backward(
    ctx: Any, dy_BSHd: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    if dy_BSHd is None:
        return None, None, None, None, None
    dq_BSHd, dk_BSGd, dv_BSGd = OPS.causal_attention_backward(_inner_contiguous(dy_BSHd), *ctx.saved_tensors, ctx.scale)
    return dq_BSHd, dk_BSGd, dv_BSGd, None, None


torch.library.register_autograd("moetrain::causal_attention", _backward, setup_context=_save)
refuse_second_derivative("causal_attention")
