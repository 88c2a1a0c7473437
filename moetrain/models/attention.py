"""Causal grouped-query attention inside documents. Shapes: B rows, S tokens, D width, H heads, d head size.

Under tensor parallelism a rank has some of the heads, and between layers t of the T = B * S tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.config import ModelConfig
from moetrain.mesh.tensor_parallel import Cut, TensorParallel
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
    """Grouped-query attention with rotary embeddings; ``q``, ``k``, ``v``, ``o`` are its projections.

    A rank of a tp group has the rows of ``q`` and the columns of ``o`` of its heads. Of ``k`` and ``v`` it has its own
    rows where their heads divide over the group, else all of them, of which it uses those that its heads read.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel | None = None) -> None:
        """``tp`` must divide the heads; one rank where it is left out."""
        super().__init__()
        self.tp = tp or TensorParallel()
        self.head_dim = config.head_dim
        self._heads = self.tp.cut(0, config.num_heads)
        self._kv_heads = _kv_heads(config, self.tp)
        num_groups = config.num_heads // config.num_kv_heads
        wanted = [head // num_groups for head in range(self._heads.start, self._heads.start + self._heads.size)]
        self._kv_first, self._num_kv_used = self._kv_heads.start, self._kv_heads.size
        if self._kv_heads.size == config.num_kv_heads:
            self._kv_first, self._num_kv_used = wanted[0], wanted[-1] + 1 - wanted[0]
        # Which of the heads used here each query head reads, where that is not so many in a row for each.
        evenly = wanted == [wanted[0] + head * self._num_kv_used // len(wanted) for head in range(len(wanted))]
        evenly = evenly and len(wanted) % self._num_kv_used == 0
        self._kv_of_head = None if evenly else [head - self._kv_first for head in wanted]
        self._kv_on_device: Tensor | None = None
        self.num_groups = len(wanted) // self._num_kv_used if evenly else 1
        q_width, kv_width = self._heads.size * config.head_dim, self._kv_heads.size * config.head_dim
        self.q = nn.Linear(config.width, q_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o = nn.Linear(q_width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def cuts(self) -> dict[str, Cut]:
        """The parameters of which this rank has a part."""
        d, heads, kv_heads = self.head_dim, self._heads, self._kv_heads
        cuts = {"o.weight": _in_elements(heads, 1, d)}
        kinds = ("weight",) if self.q.bias is None else ("weight", "bias")
        cuts |= {f"q.{kind}": _in_elements(heads, 0, d) for kind in kinds}
        if kv_heads.size < kv_heads.total:
            cuts |= {f"{name}.{kind}": _in_elements(kv_heads, 0, d) for name in ("k", "v") for kind in kinds}
        return cuts

    def forward(self, x_tD: Tensor, plan: AttentionPlan) -> Tensor:
        """[t, D] -> [t, D]; there may be no tokens."""
        shape_BS = plan.first_BS.shape
        x_BSD = self.tp.gather(x_tD, shape_BS.numel()).unflatten(0, shape_BS)
        y_BSHd = self._attend_heads(x_BSD, plan)
        return self.tp.scatter_sum(self.o(y_BSHd.flatten(2)).flatten(0, 1))

    def _attend_heads(self, x_BSD: Tensor, plan: AttentionPlan) -> Tensor:
        """[B, S, D] -> [B, S, H, d] of the heads here."""
        q_BSHd, k_BSHd, v_BSHd = (
            projected.unflatten(-1, (-1, self.head_dim))
            for projected in (self.q(x_BSD), self._project_used(self.k, x_BSD), self._project_used(self.v, x_BSD))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSHd = self.q_norm(q_BSHd), self.k_norm(k_BSHd)
        q_BSHd, k_BSHd = (rotate(x, plan.cos_BSd, plan.sin_BSd) for x in (q_BSHd, k_BSHd))
        if self._kv_of_head is not None:
            k_BSHd, v_BSHd = (x.index_select(2, self._kv_index(x_BSD.device)) for x in (k_BSHd, v_BSHd))
        if x_BSD.device.type == "cpu":
            return causal_attention(q_BSHd, k_BSHd, v_BSHd, plan.first_BS)
        q_BHSd, k_BHSd, v_BHSd = (x.transpose(1, 2) for x in (q_BSHd, k_BSHd, v_BSHd))
        return self._attend(q_BHSd, k_BHSd, v_BHSd, plan.mask_B1SS).transpose(1, 2)

    @torch.inference_mode(False)  # the first caller may be an evaluation, the second one trains
    def _kv_index(self, device: torch.device) -> Tensor:
        """Which key head each query head reads, copied to the device once: a copy waits for it."""
        if self._kv_on_device is None or self._kv_on_device.device != device:
            self._kv_on_device = torch.tensor(self._kv_of_head, device=device)
        return self._kv_on_device

    def _project_used(self, projection: nn.Linear, x_BSD: Tensor) -> Tensor:
        """Keys or values of the heads that are read here."""
        if self._num_kv_used == self._kv_heads.size:
            return projection(x_BSD)
        begin = self._kv_first * self.head_dim
        rows = slice(begin, begin + self._num_kv_used * self.head_dim)
        bias = None if projection.bias is None else projection.bias[rows]
        return functional.linear(x_BSD, projection.weight[rows], bias)

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


def _kv_heads(config: ModelConfig, tp: TensorParallel) -> Cut:
    """The heads of keys and values whose weights this rank has: all where they do not divide over the group."""
    if config.num_kv_heads % tp.size == 0:
        return tp.cut(0, config.num_kv_heads)
    return Cut(0, 0, config.num_kv_heads, config.num_kv_heads)


def _in_elements(heads: Cut, dim: int, head_dim: int) -> Cut:
    return Cut(dim, heads.start * head_dim, heads.size * head_dim, heads.total * head_dim)
