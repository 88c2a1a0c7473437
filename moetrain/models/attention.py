"""Causal grouped-query attention inside documents. Shapes: B rows, S tokens, D width, H heads, d head size."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.config import ModelConfig
from moetrain.models.norm import RMSNorm
from moetrain.ops import causal_attention, rotate


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What all layers of one forward pass share.

    Args:
        cos_BSd: at least float32 [B, S, d/2], rotary cosines of each token's position in its document.
        sin_BSd: their sines.
        first_BS: int32, index in the row of the first token of each token's document.
        mask_B1SS: bool, true where a query (row) sees a key (column); None where plain causal attention is right, and
            on the CPU, whose own kernel takes ``first_BS``.
    """

    cos_BSd: Tensor
    sin_BSd: Tensor
    first_BS: Tensor
    mask_B1SS: Tensor | None


def plan_attention(position_BS: Tensor, document_BS: Tensor, config: ModelConfig, dtype: torch.dtype) -> AttentionPlan:
    """Rotary tables, where documents begin and, only where some row holds more than one, the mask.

    Padding (document -1) attends to padding alone, itself included, so that it never yields NaN; real tokens never
    see it. Reads one flag back from the device.

    Args:
        position_BS: int64, restarting at 0 in each document.
        document_BS: int64, ascending within a row, -1 at padding.
        config: the model.
        dtype: of the activations.
    """
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    # Angles in float64: at position 100,000 a float32 angle is wrong by 0.01.
    exponent_d = torch.arange(config.head_dim // 2, dtype=torch.float64, device=position_BS.device)
    angle_BSd = position_BS[:, :, None] * config.rope_theta ** (-2.0 * exponent_d / config.head_dim)
    cos_BSd, sin_BSd = angle_BSd.cos().to(at_least_fp32), angle_BSd.sin().to(at_least_fp32)
    mask_B1SS = None if document_BS.device.type == "cpu" else _mask(document_BS)
    return AttentionPlan(cos_BSd, sin_BSd, _first_tokens(document_BS), mask_B1SS)


def _first_tokens(document_BS: Tensor) -> Tensor:
    """[B, S] -> int32 [B, S]."""
    token_S = torch.arange(document_BS.shape[1], dtype=torch.int32, device=document_BS.device)
    begins_BS = torch.ones_like(document_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return (token_S * begins_BS).cummax(dim=1).values


def _mask(document_BS: Tensor) -> Tensor | None:
    """[B, S] -> bool [B, 1, S, S], or None."""
    # One document, and padding only behind it: causal attention already hides all there is to hide.
    if bool((document_BS[:, 1:] <= document_BS[:, :-1]).all()):
        return None
    return (document_BS[:, :, None] == document_BS[:, None, :]).tril()[:, None]


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings; ``q``, ``k``, ``v``, ``o`` are its projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_groups = config.num_heads // config.num_kv_heads
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = nn.Linear(config.width, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(q_width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, plan: AttentionPlan) -> Tensor:
        """[B, S, D] -> [B, S, D]; B may be 0."""
        q_BSHd, k_BSHd, v_BSHd = (
            project(x_BSD).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSHd = self.q_norm(q_BSHd), self.k_norm(k_BSHd)
        q_BSHd, k_BSHd = (rotate(x, plan.cos_BSd, plan.sin_BSd) for x in (q_BSHd, k_BSHd))
        if x_BSD.device.type == "cpu":
            y_BSHd = causal_attention(q_BSHd, k_BSHd, v_BSHd, plan.first_BS)
        else:
            q_BHSd, k_BHSd, v_BHSd = (x.transpose(1, 2) for x in (q_BSHd, k_BSHd, v_BSHd))
            y_BSHd = self._attend(q_BHSd, k_BHSd, v_BHSd, plan.mask_B1SS).transpose(1, 2)
        return self.o(y_BSHd.flatten(2))

    def _attend(self, q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask_B1SS: Tensor | None) -> Tensor:
        if q_BHSd.shape[0] == 0:
            # Fused kernels may refuse an empty batch; keys and values stay in the graph.
            return q_BHSd + (k_BHSd.sum() + v_BHSd.sum())
        if self.num_groups > 1 and mask_B1SS is not None:
            # The fused kernels that take a mask do not take grouped heads.
            k_BHSd = k_BHSd.repeat_interleave(self.num_groups, dim=1)
            v_BHSd = v_BHSd.repeat_interleave(self.num_groups, dim=1)
        return functional.scaled_dot_product_attention(
            q_BHSd,
            k_BHSd,
            v_BHSd,
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=self.num_groups > 1 and mask_B1SS is None,
        )
