"""The expert MLPs of one layer as one differentiable operator: SonicMoE's memory-lean algorithm (arXiv 2512.14080).

Shapes: R rows, D width, F hidden width, N (row, expert) pairs (a capacity), E experts, S slots (stacked weights).
Expert e has pairs ``offset_E1[e] : offset_E1[e + 1]`` and uses slot ``slot_E[e]``, or e. What lies beyond
``offset_E1[-1]`` is ignored, and its gradient is 0.

The backward pass keeps the rows X and the pre-activations H of each pair, and nothing else of that size: no gathered
rows, no activations, no outputs per pair. The gradient of a pair's weight is <dA', A> with dA' = dY @ w_out, where A
comes from H again; so no expert's output is needed. ``recompute_h`` keeps X alone and computes H a second time: with
a gate, that adds 4 * N * F * D FLOP to the 12 of a backward and the 6 of a forward pass.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.config.moe import Activation
from moetrain.ops.cuda_path import NATIVE_PATHS, choose_cuda_path
from moetrain.ops.expert_inputs import ExpertInputs
from moetrain.ops.expert_parts import backward_of_parts, forward_of_parts, h_columns
from moetrain.ops.native import OPS, refuse_second_derivative
from moetrain.ops.row_lists import rows_contiguous

NUM_INPUTS = len(ExpertInputs._fields)


def expert_mlp(
    x_RD: Tensor,
    row_N: Tensor,
    weight_N: Tensor,
    offset_E1: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    slot_E: Tensor | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: Activation = "swiglu",
    recompute_h: bool = False,
) -> Tensor:
    """Return y[r] = sum over r's pairs of weight * (act(x[r] @ w_in.T + b_in) @ w_out.T + b_out), experts ascending.

    Accumulates in at least fp32, in the same order for any number of threads: the same bits. Differentiable in
    ``x_RD``, ``weight_N``, ``w_in``, ``w_out`` and the biases. Weights are read at each call and nothing of them is
    kept between calls.

    Saved for the backward pass, in elements of x's dtype: R * D for the rows, which the caller holds anyway, and
    N * P for H, with P = 64 * ceil(F / 32) where gated and 64 * ceil(F / 64) where not. Only where F is a multiple of
    32 is that 4 * N * F bytes for H in bf16 with a gate; F = 33 keeps as much as F = 64. N counts the list's capacity,
    not its true length ``offset_E1[-1]``. Beside them N int32 rows, N weights and E + 1 offsets. With ``recompute_h``
    there is no H, and without a gradient to come nothing is saved.

    weight * A is rounded to x's dtype before the products that give y and the gradient of ``w_out``. In fp16 a weight
    near 1e-5 makes it subnormal (below 6.1e-5), and digits are lost; bf16 has the range for it.

    On CUDA it has kernels of its own for bf16 with D and F multiples of 8, in weights at multiples of 16 bytes, gate
    and up adjoining, each slot's its own (not one that ``expand`` repeats). Everything else runs the same algorithm
    from separate products, gathers and sums, after one warning, and saves the same. The path is chosen as the operator
    runs, so that a compiled graph chooses too: see ``moetrain.ops.cuda_path``. ``MOETRAIN_CUDA_PATH`` (sm90, sm80,
    grouped_mm, simple, loop) forces one.

    On the CPU the environment variable ``MOETRAIN_CPU_ISA`` (portable, avx2, avx512, avx512_bf16, amx, amx_emulated)
    forces a path; ``moetrain._C.cpu_isas()`` lists those that the machine can run, best first.

    Args:
        x_RD: ``[R, D]``; bf16, fp16, fp32 or fp64, rows contiguous, any stride from row to row.
        row_N: int32, the row of each pair, grouped by expert; a row may occur any number of times, in any order.
        weight_N: fp32 (fp64 where x is), the weight of each pair.
        offset_E1: int32, where each expert's pairs begin and end.
        w_in: ``[S, 2, F, D]`` (gate rows, then up rows) for swiglu, ``[S, 1, F, D]`` for gelu and relu2; x's dtype,
            any stride over slots, each slot contiguous.
        w_out: ``[S, D, F]``, likewise.
        slot_E: int32 slot of each expert, or None where expert e uses slot e (then S = E). Experts may share a slot.
        b_in: ``[S, 2 or 1, F]`` of x's dtype, or None.
        b_out: ``[S, D]`` of x's dtype, or None.
        activation: "swiglu" (silu(gate) * up), "gelu" (by the error function) or "relu2" (relu squared).
        recompute_h: save memory instead of time, see above.

    Returns:
        ``[R, D]`` of x's dtype; rows without pairs are 0.

    Raises:
        ValueError: a shape, stride, device, option or (on the CPU, or with MOETRAIN_DEBUG=1) a row, slot or offset is
            wrong, or MOETRAIN_CPU_ISA or MOETRAIN_CUDA_PATH names what cannot run here.
        TypeError: a dtype is wrong.
    """
    inputs = ExpertInputs(x_RD, row_N, weight_N, offset_E1, w_in, w_out, slot_E, b_in, b_out)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y_RD, _ = OPS.expert_mlp(*inputs, activation, needs_gradient and not recompute_h)
    return y_RD


@torch.library.impl("moetrain::expert_mlp", "CUDA")
def _expert_mlp_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, (activation, save_h) = ExpertInputs(*args[:NUM_INPUTS]), args[NUM_INPUTS:]
    path = choose_cuda_path(inputs)
    if path in NATIVE_PATHS:
        return OPS.expert_mlp_kernels(*args)
    return forward_of_parts(inputs, activation, save_h, path)


@torch.library.impl("moetrain::expert_mlp_backward", "CUDA")
def _expert_mlp_backward_cuda(dy_RD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs, (h, activation) = ExpertInputs(*args[:NUM_INPUTS]), args[NUM_INPUTS:]
    path = choose_cuda_path(inputs)
    if path in NATIVE_PATHS:
        return OPS.expert_mlp_kernels_backward(dy_RD, *args)
    return backward_of_parts(dy_RD, inputs, h, activation, path)


@torch.library.register_fake("moetrain::expert_mlp_kernels")
@torch.library.register_fake("moetrain::expert_mlp")
def _expert_mlp_fake(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, (_, save_h) = ExpertInputs(*args[:NUM_INPUTS]), args[NUM_INPUTS:]
    num_pairs = inputs.row_N.shape[0]
    h = inputs.x_RD.new_empty((num_pairs, h_columns(inputs.w_in)) if save_h else 0)
    return inputs.x_RD.new_empty(inputs.x_RD.shape), h


@torch.library.register_fake("moetrain::expert_mlp_kernels_backward")
@torch.library.register_fake("moetrain::expert_mlp_backward")
def _expert_mlp_backward_fake(dy_RD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ExpertInputs(*args[:NUM_INPUTS]).empty_grads()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, save_h = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # else autograd would make zeros of h's size for the backward pass to ignore
    ctx.save_for_backward(*tensors, h if save_h else None)


def _expert_mlp_backward(ctx: Any, dy_RD: Tensor | None, _dh: None) -> tuple[Tensor | None, ...]:
    if dy_RD is None:
        return (None,) * len(ctx.needs_input_grad)
    dx_RD, dweight_N, dw_in, dw_out, db_in, db_out = OPS.expert_mlp_backward(
        rows_contiguous(dy_RD), *ctx.saved_tensors, ctx.activation
    )
    has_b_in, has_b_out = ctx.needs_input_grad[7:9]
    dbs = (db_in if has_b_in else None, db_out if has_b_out else None)
    return dx_RD, None, dweight_N, None, dw_in, dw_out, None, *dbs, None, None


torch.library.register_autograd("moetrain::expert_mlp", _expert_mlp_backward, setup_context=_save)
refuse_second_derivative("expert_mlp")
