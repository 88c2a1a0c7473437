"""Products of groups of rows and the groups' matrices, natively: one weight matrix per group, groups of any size.

Shapes: M rows in all (a capacity), E groups, S slots (stacked weights), N and K the sides of a weight matrix, T rows of
a matrix that a list picks from. Group e is rows
``offset_E1[e] : offset_E1[e + 1]``; it uses slot ``slot_E[e]``, or e. What lies beyond ``offset_E1[-1]`` is ignored,
left unwritten in results, and its gradient is 0.

On CUDA bf16 runs on tensor cores where the product's sides are multiples of 8 and the matrices lie at multiples of 16
bytes (rows that do not are copied; weights and ``out`` are not), one for each slot, by the kernels for Hopper or those
for sm_80 and later. All else runs by simple kernels, bf16 after a warning: other dtypes, and sums added to an ``out``
in bf16 or with gaps. The choice follows from device, dtype, sizes and strides alone, and nothing waits for the device.
``MOETRAIN_CUDA_PATH`` forces sm90, sm80 or simple, see ``moetrain.ops.cuda_path``.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS
from moetrain.ops.row_lists import rows_contiguous
from moetrain.ops.scatter_add_rows import rows_grad
from moetrain.ops.simple_kernels import warn_of_simple_kernels


def grouped_gemm(
    a_MK: Tensor,
    b_SNK: Tensor,
    offset_E1: Tensor,
    *,
    slot_E: Tensor | None = None,
    row_M: Tensor | None = None,
    b_is_kn: bool = False,
) -> Tensor:
    """Multiply each group's rows by its slot: ``c[m] = a[m] @ b[slot of m's group].T`` (varlen-M).

    Accumulates in at least fp32. Differentiable in ``a_MK`` and ``b_SNK``.

    Args:
        a_MK: ``[M, K]``, or ``[T, K]`` with ``row_M``; bf16, fp16, fp32 or fp64, rows contiguous.
        b_SNK: ``[S, N, K]`` of a's dtype, rows contiguous, any stride over slots.
        offset_E1: int32, where groups begin and end.
        slot_E: int32 slot of each group, or None where group e uses slot e (then S = E).
        row_M: int32; where given, row m of the product reads ``a[row_M[m]]`` (a fused gather).
        b_is_kn: b is ``[S, K, N]`` and is not transposed.

    Returns:
        ``[M, N]`` of a's dtype.

    Raises:
        ValueError: a shape, stride, device or (on the CPU, or with MOETRAIN_DEBUG=1) an id or offset is wrong, or
            MOETRAIN_CUDA_PATH names what cannot run here.
        TypeError: a dtype is wrong.
    """
    c_MN = OPS.grouped_gemm(a_MK, b_SNK, offset_E1, slot_E, row_M, b_is_kn)
    warn_of_simple_kernels("grouped_gemm", a_MK, b_SNK, offset_E1, slot_E, row_M, b_is_kn)
    return c_MN


@torch.library.register_fake("moetrain::grouped_gemm_obstacle")
def _grouped_gemm_obstacle_fake(*args: Any) -> str:
    return ""


@torch.library.register_fake("moetrain::grouped_gemm")
def _grouped_gemm_fake(
    a_MK: Tensor, b_SNK: Tensor, offset_E1: Tensor, slot_E: Tensor | None, row_M: Tensor | None, b_is_kn: bool
) -> Tensor:
    num_rows = a_MK.shape[0] if row_M is None else row_M.shape[0]
    return a_MK.new_empty(num_rows, b_SNK.shape[2 if b_is_kn else 1])


def _grouped_gemm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a_MK, b_SNK, offset_E1, slot_E, row_M, ctx.b_is_kn = inputs
    ctx.num_rows, ctx.num_slots = a_MK.shape[0], b_SNK.shape[0]
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a_MK if needs_b else None, b_SNK if needs_a else None, offset_E1, slot_E, row_M)


def _grouped_gemm_backward(ctx: Any, dc_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    a_MK, b_SNK, offset_E1, slot_E, row_M = ctx.saved_tensors
    dc_MN = rows_contiguous(dc_MN)
    da, db = None, None
    if ctx.needs_input_grad[0]:
        da_MK = OPS.grouped_gemm(dc_MN, b_SNK, offset_E1, slot_E, None, not ctx.b_is_kn)
        da = rows_grad(da_MK, row_M, offset_E1, ctx.num_rows)
    if ctx.needs_input_grad[1] and ctx.b_is_kn:
        db = OPS.grouped_gemm_varlen_k(a_MK, dc_MN, offset_E1, slot_E, row_M, None, ctx.num_slots)
    elif ctx.needs_input_grad[1]:
        db = OPS.grouped_gemm_varlen_k(dc_MN, a_MK, offset_E1, slot_E, None, row_M, ctx.num_slots)
    return da, db, None, None, None, None


torch.library.register_autograd("moetrain::grouped_gemm", _grouped_gemm_backward, setup_context=_grouped_gemm_save)
