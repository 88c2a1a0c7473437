"""Add rows by an index list, natively: the transpose of ``moetrain.ops.gather_rows``, the weighted sum of a combine.

Shapes: T rows of the result, D width, N list entries (a capacity), E groups. A list's true length is
``offset_E1[-1]``, read on the device; what lies beyond is ignored, left unwritten in results, and its gradient is 0.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.gather_rows import gather_rows
from moetrain.ops.native import OPS
from moetrain.ops.row_lists import rows_contiguous, zero_tail_


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


def rows_grad(grad_MX: Tensor, row_M: Tensor | None, offset_E1: Tensor, num_rows: int) -> Tensor:
    """Return the gradient of a matrix of which rows ``row_M`` (None: all, in order) were read, given theirs."""
    if row_M is None:
        return zero_tail_(grad_MX, offset_E1)
    return scatter_add_rows(grad_MX, row_M, None, offset_E1, num_rows=num_rows)


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
