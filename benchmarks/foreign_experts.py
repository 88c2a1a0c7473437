"""The experts of Hugging Face transformers and of Megatron-Core, run on the same layer; both are optional.

Their weights share memory with the layer's, their gradients are brought into its shapes for the check.
Shapes: T tokens, D width, F hidden width, E experts, K per token, N pairs.
"""

import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from expert_layer import Competitor, Layer
from torch import Tensor, nn


def hugging_face(layer: Layer, implementation: str) -> Competitor:
    """The experts of ``Qwen3MoeSparseMoeBlock`` with one of its implementations; routing is handed in.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = layer.shape
    config = Qwen3MoeConfig(hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E, hidden_act="silu")
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = nn.Parameter(layer.w_in_E2FD.detach().flatten(1, 2))
    experts.down_proj = nn.Parameter(layer.w_out_EDF.detach())

    def run() -> Tensor:
        # Its router hands over weights of the activations' type.
        y_TD: Tensor = experts(layer.x_TD, layer.expert_id_TK, layer.weight_TK.to(layer.x_TD.dtype))
        return y_TD

    def canonical(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        dx_TD, dweight_TK, dw_in, dw_out = gradients
        return dx_TD, dweight_TK.flatten()[layer.pair_N.long()], dw_in.unflatten(1, (2, -1)), dw_out

    leaves = (layer.x_TD, layer.weight_TK, experts.gate_up_proj, experts.down_proj)
    return Competitor(f"transformers {implementation}", run, leaves, canonical)


def megatron_sequential(layer: Layer) -> Competitor:
    """Megatron-Core's ``SequentialMLP`` between its own ``permute`` and ``unpermute``.

    Raises:
        ImportError: megatron-core is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every fused kernel that is not installed
        from megatron.core.transformer.moe.moe_utils import permute, unpermute

        experts = _build_megatron(layer)
    shape = layer.shape
    fc1s = tuple(expert.linear_fc1.weight for expert in experts.local_experts)
    fc2s = tuple(expert.linear_fc2.weight for expert in experts.local_experts)
    count_E = layer.offset_E1.diff().long()
    expert_N = torch.repeat_interleave(torch.arange(shape.E, device=count_E.device), count_E)
    token_N = layer.token_N.long()
    is_chosen_TE = torch.zeros(shape.T, shape.E, dtype=torch.bool, device=count_E.device)
    is_chosen_TE[token_N, expert_N] = True
    prob_TE = torch.zeros_like(is_chosen_TE, dtype=layer.weight_N.dtype)
    prob_TE[token_N, expert_N] = layer.weight_N.detach()
    prob_TE.requires_grad_()

    def run() -> Tensor:
        x_ND, prob_N, sorted_N = permute(layer.x_TD, is_chosen_TE, probs=prob_TE, num_out_tokens=shape.num_pairs)
        y_ND, _ = experts(x_ND, count_E, prob_N)
        y_TD: Tensor = unpermute(y_ND, sorted_N, layer.x_TD.shape)
        return y_TD

    def canonical(gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        dx_TD, dprob_TE, *dws = gradients
        dw_in = torch.stack(dws[: shape.E]).unflatten(1, (2, -1))
        return dx_TD, dprob_TE[token_N, expert_N], dw_in, torch.stack(dws[shape.E :])

    return Competitor("Megatron SequentialMLP", run, (layer.x_TD, prob_TE, *fc1s, *fc2s), canonical)


def _build_megatron(layer: Layer) -> Any:
    """Its module on this one process; without a GPU it must be told not to ask for one while it is built."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    shape, dtype = layer.shape, layer.x_TD.dtype
    config = TransformerConfig(
        num_layers=1, hidden_size=shape.D, num_attention_heads=1, ffn_hidden_size=shape.F, moe_ffn_hidden_size=shape.F,
        num_moe_experts=shape.E, moe_router_topk=shape.K, gated_linear_unit=True,
        activation_func=nn.functional.silu, add_bias_linear=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, use_cpu_initialization=True, perform_initialization=False,
        params_dtype=dtype, bf16=dtype == torch.bfloat16,
    )  # fmt: skip
    with mock.patch.object(torch.cuda, "current_device", return_value=layer.x_TD.device):
        experts = SequentialMLP(
            shape.E,
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            get_default_pg_collection(),
        )
    for idx, expert in enumerate(experts.local_experts):
        expert.linear_fc1.weight.data = layer.w_in_E2FD.detach()[idx].flatten(0, 1)
        expert.linear_fc2.weight.data = layer.w_out_EDF.detach()[idx]
    return experts
