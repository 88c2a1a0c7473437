"""Gather rows by an index list, natively. Its transpose is ``moetrain.ops.scatter_add_rows``.

Shapes: T rows of the matrix, D width, N list entries (a capacity), E groups. A list's true length is
``offset_E1[-1]``, read on the device; what lies beyond is ignored, left unwritten in results, and its gradient is 0.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS
from moetrain.ops.row_lists import rows_contiguous


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


@torch.library.register_fake("moetrain::gather_rows")
def _gather_rows_fake(x_TD: Tensor, row_N: Tensor, offset_E1: Tensor | None) -> Tensor:
    return x_TD.new_empty(row_N.shape[0], x_TD.shape[1])


def _gather_rows_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, row_N, offset_E1 = inputs
    ctx.save_for_backward(row_N, offset_E1)
    ctx.num_rows = x_TD.shape[0]


def _gather_rows_backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
    row_N, offset_E1 = ctx.saved_tensors
    return OPS.scatter_add_rows(rows_contiguous(dy_ND), row_N, None, offset_E1, ctx.num_rows), None, None


torch.library.register_autograd("moetrain::gather_rows", _gather_rows_backward, setup_context=_gather_rows_save)
