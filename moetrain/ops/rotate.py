"""Rotary embeddings, natively on the CPU. Shapes: B rows of S tokens, H heads, d elements of a head."""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS
from moetrain.ops.reference_rotate import rotate_reference


def rotate(x_BSHd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor) -> Tensor:
    """Turn element pairs (i, i + d/2) by the token's angles (RoFormer, in the half-split order of GPT-NeoX).

    Computes in the type of the tables and rounds once. Differentiable in ``x_BSHd``, with the tables alone kept. On
    other devices than CPUs it is composed of torch's operators.

    Args:
        x_BSHd: bf16, fp16, fp32 or fp64; d even and contiguous, any other strides.
        cos_BSd: ``[B, S, d / 2]``, the cosine of each pair's angle; fp32 (fp64 where x is), contiguous.
        sin_BSd: their sines, likewise.

    Returns:
        ``[B, S, H, d]`` of x's dtype, contiguous.

    Raises:
        ValueError: a shape, stride or device is wrong.
        TypeError: a dtype is wrong.
    """
    if x_BSHd.device.type != "cpu":
        return rotate_reference(x_BSHd, cos_BSd, sin_BSd)
    return OPS.rotate(x_BSHd, cos_BSd, sin_BSd, False)


@torch.library.register_fake("moetrain::rotate")
def _rotate_fake(x_BSHd: Tensor, cos_BSd: Tensor, sin_BSd: Tensor, inverse: bool) -> Tensor:
    return x_BSHd.new_empty(x_BSHd.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, cos_BSd, sin_BSd, ctx.inverse = inputs
    ctx.save_for_backward(cos_BSd, sin_BSd)


def _backward(ctx: Any, dy_BSHd: Tensor) -> tuple[Tensor, None, None, None]:
    inner_contiguous = dy_BSHd.stride(-1) == 1 or dy_BSHd.shape[-1] == 1
    dy_BSHd = dy_BSHd if inner_contiguous else dy_BSHd.contiguous()
    return OPS.rotate(dy_BSHd, *ctx.saved_tensors, not ctx.inverse), None, None, None


torch.library.register_autograd("moetrain::rotate", _backward, setup_context=_save)
