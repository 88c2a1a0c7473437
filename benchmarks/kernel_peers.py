"""Other libraries' fused experts for GPUs, on the same layer: Liger, ScatterMoE, SonicMoE, QuACK. All are optional.

Each takes weights in a layout of its own. That copy is made before anything is timed, and gradients are brought back
into the layer's shapes for the check alone. Shapes: T tokens, D width, F hidden width, E experts, K per token, N pairs.
"""

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from expert_layer import Competitor, Layer
from torch import Tensor, nn


def liger(layer: Layer) -> Competitor:
    """Liger's ``LigerFusedMoEFunction``, in Triton; sorts the chosen experts itself, which is part of its time.

    Its autotuning compiles hundreds of kernels per shape; ``LIGER_FUSED_MOE_AUTOTUNE=1`` lets it, else each kernel has
    the one setting that its authors name.

    Raises:
        ImportError: liger-kernel is not installed.
    """
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    from liger_kernel.ops import LigerFusedMoEFunction

    expert_id_TK = layer.expert_id_TK.to(torch.int32)
    gate_up = layer.w_in_E2FD.detach().flatten(1, 2).requires_grad_()

    def run() -> Tensor:
        y_TD: Tensor = LigerFusedMoEFunction.apply(layer.x_TD, gate_up, layer.w_out_EDF, expert_id_TK, layer.weight_TK)
        return y_TD

    def canonical(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        dx_TD, dweight_TK, dw_in, dw_out = gradients
        return dx_TD, _of_pairs(layer, dweight_TK), dw_in.unflatten(1, (2, -1)), dw_out

    name = "Liger, not tuned" if os.environ["LIGER_FUSED_MOE_AUTOTUNE"] == "0" else "Liger"
    return Competitor(name, run, (layer.x_TD, layer.weight_TK, gate_up, layer.w_out_EDF), canonical)


def scattermoe(layer: Layer) -> Competitor:
    """ScatterMoE's ``GLUMLP``, in Triton: the first half of its up projection is multiplied by silu of the second.

    Raises:
        ImportError: scattermoe is not installed (github.com/shawntan/scattermoe).
    """
    from scattermoe.mlp import GLUMLP

    shape = layer.shape
    with torch.device("meta"):
        experts = GLUMLP(shape.D, shape.F, shape.E, shape.K, activation=nn.SiLU())
    experts.experts.weight = nn.Parameter(layer.w_in_E2FD.detach().flip(1).flatten(1, 2))
    experts.output_experts.weight = nn.Parameter(layer.w_out_EDF.detach())
    expert_id_TK = layer.expert_id_TK
    leaves = (layer.x_TD, layer.weight_TK, experts.experts.weight, experts.output_experts.weight)

    def run() -> Tensor:
        y_TD: Tensor = experts(layer.x_TD, layer.weight_TK.to(layer.x_TD.dtype), expert_id_TK)
        return y_TD

    def canonical(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        dx_TD, dweight_TK, dw_in, dw_out = gradients
        return dx_TD, _of_pairs(layer, dweight_TK), dw_in.unflatten(1, (2, -1)).flip(1), dw_out

    return Competitor("ScatterMoE", run, leaves, canonical)


def sonicmoe(layer: Layer) -> Competitor:
    """SonicMoE's ``moe_general_routing_inputs``, in CuTe: pairs by token, gate and up rows of w_in alternating.

    It groups the pairs by expert itself, which is part of its time.

    Raises:
        ImportError: sonicmoe is not installed (github.com/Dao-AILab/sonic-moe).
    """
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    shape = layer.shape
    w_in_EHD = interleave(layer.w_in_E2FD.detach()).requires_grad_()
    token_P, expert_P = pairs_by_token(layer)
    weight_P = layer.weight_TK.detach().flatten().requires_grad_()
    stream = torch.cuda.current_stream().cuda_stream if layer.x_TD.is_cuda else 0

    def run() -> Tensor:
        y_TD, _ = moe_general_routing_inputs(
            layer.x_TD, weight_P, token_P, expert_P,
            w_in_EHD.permute(1, 2, 0), None, layer.w_out_EDF.permute(1, 2, 0), None,
            shape.E, stream, ActivationType.SWIGLU,
        )  # fmt: skip
        return y_TD

    def canonical(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        dx_TD, dweight_P, dw_in, dw_out = gradients
        return dx_TD, dweight_P[layer.pair_N.long()], separate(dw_in), dw_out

    return Competitor("SonicMoE", run, (layer.x_TD, weight_P, w_in_EHD, layer.w_out_EDF), canonical)


def quack(layer: Layer) -> Competitor:
    """QuACK's GEMMs over groups of rows, in CuTe, put together as SonicMoE does; the sums home are torch's.

    Raises:
        ImportError: quack-kernels is not installed.
    """
    from quack import gemm_interface

    w_in_EHD = interleave(layer.w_in_E2FD.detach()).requires_grad_()
    leaves = (layer.x_TD, layer.weight_N, w_in_EHD, layer.w_out_EDF)

    def run() -> Tensor:
        y_TD: Tensor = _QuackExperts.apply(gemm_interface, layer.token_N, layer.offset_E1, *leaves)
        return y_TD

    def canonical(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        dx_TD, dweight_N, dw_in, dw_out = gradients
        return dx_TD, dweight_N, separate(dw_in), dw_out

    return Competitor("QuACK", run, leaves, canonical)


class _QuackExperts(torch.autograd.Function):
    """Keeps x and h; the activation is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, token_N: Tensor, offset_E1: Tensor,
        x_TD: Tensor, weight_N: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor,
    ) -> Tensor:  # fmt: skip
        h_NH, a_NF = kernels.gemm_act(
            x_TD, w_in_EHD.mT, activation="swiglu", cu_seqlens_m=offset_E1, A_idx=token_N, dynamic_scheduler=False
        )
        y_ND = kernels.gemm(a_NF, w_out_EDF.mT, cu_seqlens_m=offset_E1)
        ctx.save_for_backward(token_N, offset_E1, x_TD, weight_N, w_in_EHD, w_out_EDF, h_NH)
        ctx.kernels = kernels
        return torch.zeros_like(x_TD).index_add(0, token_N, (y_ND * weight_N[:, None]).to(x_TD.dtype))

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        token_N, offset_E1, x_TD, weight_N, w_in_EHD, w_out_EDF, h_NH = ctx.saved_tensors
        rows = {"cu_seqlens_m": offset_E1, "dynamic_scheduler": False}
        dh_NH, weighted_a_NF, dweight_N = ctx.kernels.gemm_dact(
            dy_TD, w_out_EDF, PreAct=h_NH, activation="swiglu", colvec_scale=weight_N, colvec_reduce=True,
            A_idx=token_N, **rows,
        )  # fmt: skip
        over_pairs = {"cu_seqlens_k": offset_E1, "A_idx": token_N, "dynamic_scheduler": False}
        dw_in_EHD, dw_out_EDF = torch.empty_like(w_in_EHD), torch.empty_like(w_out_EDF)
        ctx.kernels.gemm(dy_TD.T, weighted_a_NF, out=dw_out_EDF, **over_pairs)
        ctx.kernels.gemm(x_TD.T, dh_NH, out=dw_in_EHD.mT, **over_pairs)
        dx_ND = ctx.kernels.gemm(dh_NH, w_in_EHD, **rows)
        dx_TD = torch.zeros_like(x_TD).index_add(0, token_N, dx_ND)
        return None, None, None, dx_TD, dweight_N.to(weight_N.dtype), dw_in_EHD, dw_out_EDF


def interleave(w_in_E2FD: Tensor) -> Tensor:
    """``[E, 2F, D]`` with row 2f the gate's and row 2f + 1 the up projection's row f."""
    return w_in_E2FD.transpose(1, 2).flatten(1, 2).contiguous()


def separate(w_in_EHD: Tensor) -> Tensor:
    """The inverse of ``interleave``: ``[E, 2, F, D]``."""
    return w_in_EHD.unflatten(1, (-1, 2)).transpose(1, 2)


def pairs_by_token(layer: Layer) -> tuple[Tensor, Tensor]:
    """Token and expert of every pair, int32, tokens ascending."""
    token_P = torch.arange(layer.shape.T, dtype=torch.int32, device=layer.x_TD.device).repeat_interleave(layer.shape.K)
    return token_P, layer.expert_id_TK.flatten().to(torch.int32)


def _of_pairs(layer: Layer, dweight_TK: Tensor) -> Tensor:
    return dweight_TK.flatten()[layer.pair_N.long()]
