"""Sums of outer products over groups of rows, natively: the gradient of ``moetrain.ops.grouped_gemm``'s weights.

Shapes: M rows in all (a capacity), E groups, S slots (stacked weights), I and J the sides of a weight gradient, T rows
of a matrix that a list picks from. Groups, slots, tails and the choice of kernels on CUDA are as in ``grouped_gemm``.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.ops.native import OPS
from moetrain.ops.row_lists import rows_contiguous
from moetrain.ops.scatter_add_rows import rows_grad
from moetrain.ops.simple_kernels import warn_of_simple_kernels


def grouped_gemm_varlen_k(
    a_MI: Tensor,
    b_MJ: Tensor,
    offset_E1: Tensor,
    *,
    slot_E: Tensor | None = None,
    row_a_M: Tensor | None = None,
    row_b_M: Tensor | None = None,
    num_slots: int,
    out: Tensor | None = None,
) -> Tensor:
    """Sum outer products of rows per slot: ``out[s] = sum over rows m of s's groups of a[m].T @ b[m]`` (varlen-K).

    Groups of one slot are summed in ascending order, in at least fp32; slots without rows are zero. Differentiable in
    ``a_MI`` and ``b_MJ``, except with ``out``.

    Args:
        a_MI: ``[M, I]``, or ``[T, I]`` with ``row_a_M``; bf16, fp16, fp32 or fp64, rows contiguous.
        b_MJ: ``[M, J]``, or ``[T, J]`` with ``row_b_M``; a's dtype, rows contiguous.
        offset_E1: int32, where groups begin and end.
        slot_E: int32 slot of each group, or None where group e adds to slot e (then ``num_slots`` = E).
        row_a_M: int32; where given, row m reads ``a[row_a_M[m]]`` (a fused gather).
        row_b_M: int32, likewise for b.
        num_slots: S.
        out: ``[S, I, J]`` to add to in place, of a's dtype or fp32; any stride over slots.

    Returns:
        ``[S, I, J]`` of a's dtype, or ``out``.

    Raises:
        ValueError: a shape, stride, device or (on the CPU, or with MOETRAIN_DEBUG=1) an id or offset is wrong,
            MOETRAIN_CUDA_PATH names what cannot run here, or ``out`` is given where a gradient would have to flow
            through it.
        TypeError: a dtype is wrong.
    """
    lists = (offset_E1, slot_E, row_a_M, row_b_M)
    if out is None:
        sum_SIJ = OPS.grouped_gemm_varlen_k(a_MI, b_MJ, *lists, num_slots)
        warn_of_simple_kernels("grouped_gemm_varlen_k", a_MI, b_MJ, *lists, num_slots, None)
        return sum_SIJ
    if out.dim() == 3 and out.shape[0] != num_slots:
        raise ValueError(f"grouped_gemm_varlen_k: out must have num_slots ({num_slots}) slots, got {tuple(out.shape)}")
    if torch.is_grad_enabled() and (a_MI.requires_grad or b_MJ.requires_grad or out.requires_grad):
        raise ValueError("grouped_gemm_varlen_k: adding to out has no gradient; call it under torch.no_grad()")
    OPS.grouped_gemm_varlen_k_(out, a_MI, b_MJ, *lists)
    warn_of_simple_kernels("grouped_gemm_varlen_k", a_MI, b_MJ, *lists, num_slots, out)
    return out


@torch.library.register_fake("moetrain::grouped_gemm_varlen_k_obstacle")
def _varlen_k_obstacle_fake(*args: Any) -> str:
    return ""


@torch.library.register_fake("moetrain::grouped_gemm_varlen_k")
def _varlen_k_fake(
    a_MI: Tensor,
    b_MJ: Tensor,
    offset_E1: Tensor,
    slot_E: Tensor | None,
    row_a_M: Tensor | None,
    row_b_M: Tensor | None,
    num_slots: int,
) -> Tensor:
    return a_MI.new_empty(num_slots, a_MI.shape[1], b_MJ.shape[1])


@torch.library.register_fake("moetrain::grouped_gemm_varlen_k_")
def _varlen_k_accumulate_fake(
    out_SIJ: Tensor,
    a_MI: Tensor,
    b_MJ: Tensor,
    offset_E1: Tensor,
    slot_E: Tensor | None,
    row_a_M: Tensor | None,
    row_b_M: Tensor | None,
) -> None:
    return None


def _varlen_k_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a_MI, b_MJ, offset_E1, slot_E, row_a_M, row_b_M, _ = inputs
    ctx.a_rows, ctx.b_rows = a_MI.shape[0], b_MJ.shape[0]
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a_MI if needs_b else None, b_MJ if needs_a else None, offset_E1, slot_E, row_a_M, row_b_M)


def _varlen_k_backward(ctx: Any, dout_SIJ: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
    a_MI, b_MJ, offset_E1, slot_E, row_a_M, row_b_M = ctx.saved_tensors
    dout_SIJ = rows_contiguous(dout_SIJ)
    da, db = None, None
    if ctx.needs_input_grad[0]:
        da_MI = OPS.grouped_gemm(b_MJ, dout_SIJ, offset_E1, slot_E, row_b_M, False)
        da = rows_grad(da_MI, row_a_M, offset_E1, ctx.a_rows)
    if ctx.needs_input_grad[1]:
        db_MJ = OPS.grouped_gemm(a_MI, dout_SIJ, offset_E1, slot_E, row_a_M, True)
        db = rows_grad(db_MJ, row_b_M, offset_E1, ctx.b_rows)
    return da, db, None, None, None, None, None


torch.library.register_autograd("moetrain::grouped_gemm_varlen_k", _varlen_k_backward, setup_context=_varlen_k_save)
