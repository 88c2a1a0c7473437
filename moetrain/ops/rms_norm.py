"""Root-mean-square normalisation, natively on the CPU. Shapes: D the normalised width."""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS, refuse_second_derivative
from moetrain.ops.reference_rms_norm import rms_norm_reference


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019).

    Computes in at least fp32 and rounds once. Every sum, that of the weight's gradient over all rows included, has one
    order, whatever the number of threads. Differentiable in ``x`` and ``weight_D``; keeps both, and one number per row.
    On other devices than CPUs it is composed of torch's operators.

    Args:
        x: ``[..., D]``, bf16, fp16, fp32 or fp64, of any strides; there may be no rows, but D is at least 1.
        weight_D: any of these dtypes; read in the type of the sums.
        eps: added to the mean of squares.

    Returns:
        ``[..., D]`` of x's dtype.

    Raises:
        ValueError: a shape or device is wrong.
        TypeError: a dtype is wrong.
    """
    if x.device.type != "cpu":
        return rms_norm_reference(x, weight_D, eps)
    y, _ = OPS.rms_norm(x, weight_D, eps)
    return y


@torch.library.register_fake("moetrain::rms_norm")
def _rms_norm_fake(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    at_least_fp32 = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=at_least_fp32)


@torch.library.register_fake("moetrain::rms_norm_backward")
def _rms_norm_backward_fake(dy: Tensor, x: Tensor, weight_D: Tensor, inv_rms: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight_D.new_empty(weight_D.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight_D, _ = inputs
    _, inv_rms = output
    ctx.mark_non_differentiable(inv_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight_D, inv_rms)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
    if dy is None:
        return None, None, None
    dx, dweight_D = OPS.rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dweight_D, None


torch.library.register_autograd("moetrain::rms_norm", _backward, setup_context=_save)
refuse_second_derivative("rms_norm")
