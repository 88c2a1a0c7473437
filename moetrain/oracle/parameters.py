"""Which parameters a model has, by their logical names, and well-scaled random values for them.

Shapes: V vocabulary, D width, E experts, F expert hidden width, G matrices in front of the activation (2 if gated).
"""

import torch
from torch import Tensor

from moetrain.config import ModelConfig, MoEConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model: ModelConfig, moe: MoEConfig) -> Shapes:
    """Every logical parameter name and its full shape, from the embedding to the head."""
    shapes: Shapes = {"embed.weight": (model.vocab_size, model.width)}
    for layer in range(model.num_layers):
        shapes |= _attention_shapes(f"layers.{layer}", model)
        if layer in model.moe_layers:
            shapes |= _moe_shapes(f"layers.{layer}.moe", model.width, moe)
        else:
            shapes[f"layers.{layer}.mlp.w_in"] = (2 if moe.gated else 1, model.dense_width, model.width)
            shapes[f"layers.{layer}.mlp.w_out"] = (model.width, model.dense_width)
    shapes["final_norm.weight"] = (model.width,)
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, model.width)
    return shapes


def _attention_shapes(prefix: str, model: ModelConfig) -> Shapes:
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: Shapes = {f"{prefix}.attn_norm.weight": (model.width,), f"{prefix}.mlp_norm.weight": (model.width,)}
    for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
        shapes[f"{prefix}.attn.{name}.weight"] = (width, model.width)
        if model.qkv_bias:
            shapes[f"{prefix}.attn.{name}.bias"] = (width,)
    shapes[f"{prefix}.attn.o.weight"] = (model.width, q_width)
    if model.qk_norm:
        shapes[f"{prefix}.attn.q_norm.weight"] = (model.head_dim,)
        shapes[f"{prefix}.attn.k_norm.weight"] = (model.head_dim,)
    return shapes


def _moe_shapes(prefix: str, width: int, moe: MoEConfig) -> Shapes:
    gates = 2 if moe.gated else 1
    shapes: Shapes = {
        f"{prefix}.router.weight": (moe.num_experts, width),
        f"{prefix}.experts.w_in": (moe.num_experts, gates, moe.expert_width, width),
        f"{prefix}.experts.w_out": (moe.num_experts, width, moe.expert_width),
    }
    if moe.shared_hidden:
        shapes[f"{prefix}.shared.w_in"] = (gates, moe.shared_hidden, width)
        shapes[f"{prefix}.shared.w_out"] = (width, moe.shared_hidden)
    if moe.shared_gate:
        shapes[f"{prefix}.shared.gate"] = (1, width)
    return shapes


def random_parameters(model: ModelConfig, moe: MoEConfig, *, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values that leave no part of the model near zero or near a constant.

    Matrices are normal with variance 1 / fan-in, norms lie around 1 and biases around 0, so that a wrong factor
    anywhere moves the loss (a standard deviation of 0.02 would hide it).
    """
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(model, moe).items():
        normal = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * normal
        elif name.endswith(".bias"):
            value = 0.2 * normal
        elif name == "embed.weight":
            value = normal
        else:
            value = normal / shape[-1] ** 0.5
        values[name] = value.to(dtype)
    return values
