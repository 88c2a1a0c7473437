"""Move rows by an index list, natively: gather, and its transpose, the weighted sum home.

Shapes: T rows of the matrix, D width, N list entries (a capacity), E groups. A list's true length is
``offset_E1[-1]``, read on the device; what lies beyond is ignored, left unwritten in results, and its gradient is 0.
The CUDA kernels have never run on a GPU: they are compiled, and run on the host under emulation.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS


def gather_rows(x_TD: Tensor, row_N: Tensor, offset_E1: Tensor | None = None) -> Tensor:
    """Return ``x_TD[row_N]`` as ``[N, D]``; differentiable in ``x_TD``.

    Args:
        x_TD: bf16, fp16, fp32 or fp64; rows contiguous, any stride from row to row.
        row_N: int32 row numbers.
        offset_E1: int32; where given, only the first ``offset_E1[-1]`` entries count.

    Returns:
        ``[N, D]`` of x's dtype.

    Raises:
        ValueError: a shape, stride, device or (on the CPU, or with MOETRAIN_DEBUG=1) a row number is wrong.
        TypeError: a dtype is wrong.
    """
    return OPS.gather_rows(x_TD, row_N, offset_E1)


def scatter_add_rows(
    y_ND: Tensor, row_N: Tensor, weight_N: Tensor | None = None, offset_E1: Tensor | None = None, *, num_rows: int
) -> Tensor:
    """Return ``x[t] = sum over n with row_N[n] == t of weight_N[n] * y_ND[n]``, n ascending.

    The sum runs in at least fp32, always in the same order, and is rounded once: the same bits for any number of
    threads. Rows that nothing names are zero. Differentiable in ``y_ND`` and ``weight_N``.

    Args:
        y_ND: bf16, fp16, fp32 or fp64; rows contiguous, any stride from row to row.
        row_N: int32, the row of the result that each row of y adds to.
        weight_N: fp32 (fp64 where y is), or None for ones.
        offset_E1: int32; where given, only the first ``offset_E1[-1]`` entries count.
        num_rows: T, the rows of the result.

    Returns:
        ``[T, D]`` of y's dtype.

    Raises:
        ValueError: a shape, stride, device or (on the CPU, or with MOETRAIN_DEBUG=1) a row number is wrong.
        TypeError: a dtype is wrong.
    """
    return OPS.scatter_add_rows(y_ND, row_N, weight_N, offset_E1, num_rows)


def rows_contiguous(x: Tensor) -> Tensor:
    """Return ``x``, copied if its rows overlap or are strided inside, as expanded gradients are."""
    if x.numel() == 0:
        return x
    inner_ok = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if inner_ok and (x.stride(-2) >= x.shape[-1] or x.shape[-2] == 1) else x.contiguous()


def zero_tail_(x: Tensor, offset_E1: Tensor | None) -> Tensor:
    """Set ``x`` to zero beyond ``offset_E1[-1]``, in place and without asking the host where that is; return it."""
    if offset_E1 is None:
        return x
    is_tail_N = torch.arange(x.shape[0], device=x.device) >= offset_E1[-1]
    return x.masked_fill_(is_tail_N.view(-1, *[1] * (x.dim() - 1)), 0)


@torch.library.register_fake("moetrain::gather_rows")
def _gather_rows_fake(x_TD: Tensor, row_N: Tensor, offset_E1: Tensor | None) -> Tensor:
    return x_TD.new_empty(row_N.shape[0], x_TD.shape[1])


def _gather_rows_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, row_N, offset_E1 = inputs
    ctx.save_for_backward(row_N, offset_E1)
    ctx.num_rows = x_TD.shape[0]


def _gather_rows_backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
    row_N, offset_E1 = ctx.saved_tensors
    return scatter_add_rows(rows_contiguous(dy_ND), row_N, None, offset_E1, num_rows=ctx.num_rows), None, None


torch.library.register_autograd("moetrain::gather_rows", _gather_rows_backward, setup_context=_gather_rows_save)


@torch.library.register_fake("moetrain::scatter_add_rows")
def _scatter_add_rows_fake(
    y_ND: Tensor, row_N: Tensor, weight_N: Tensor | None, offset_E1: Tensor | None, num_rows: int
) -> Tensor:
    return y_ND.new_empty(num_rows, y_ND.shape[1])


def _scatter_add_rows_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y_ND, row_N, weight_N, offset_E1, _ = inputs
    needs_y = weight_N is not None and ctx.needs_input_grad[2]
    ctx.save_for_backward(y_ND if needs_y else None, row_N, weight_N, offset_E1)


def _scatter_add_rows_backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    y_ND, row_N, weight_N, offset_E1 = ctx.saved_tensors
    dx_ND = gather_rows(rows_contiguous(dx_TD), row_N, offset_E1)
    if weight_N is None:
        return zero_tail_(dx_ND, offset_E1), None, None, None, None
    dy_ND, dweight_N = None, None
    if ctx.needs_input_grad[0]:
        dy_ND = zero_tail_((weight_N[:, None] * dx_ND).to(dx_ND.dtype), offset_E1)
    if ctx.needs_input_grad[2]:
        dweight_N = zero_tail_((y_ND.to(weight_N.dtype) * dx_ND).sum(dim=1), offset_E1)
    return dy_ND, None, dweight_N, None, None


torch.library.register_autograd(
    "moetrain::scatter_add_rows", _scatter_add_rows_backward, setup_context=_scatter_add_rows_save
)
