"""Causal grouped-query attention inside documents. Shapes: T tokens, D width, H heads, G key heads, d head size.

Under tensor parallelism a rank has some of the heads, and between layers t of the T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.config import ModelConfig
from moetrain.config.errors import require
from moetrain.mesh.tensor_parallel import Cut, TensorParallel
from moetrain.models.norm import RMSNorm
from moetrain.moe.context import RoutingMemo, once
from moetrain.ops import causal_attention, rotate
from moetrain.ops.flash_attend import FORWARD as FLASH_ATTENTION
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.ring import Ring, once_each_time, ring_attention
from moetrain.sequence.zigzag import Zigzag

FLASH_DTYPES = (torch.float16, torch.bfloat16)  # that FlashAttention takes


class Attend(Protocol):
    """Attention of one forward pass: every token to the tokens before it in its document, and to itself."""

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, memo: RoutingMemo | None) -> Tensor:
        """[T, H, d] of q's dtype; ``memo`` is the layer's, where it is recomputed."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """What all layers of one forward pass share.

    Args:
        cos_Td: at least float32 [T, d/2], rotary cosines of each token's position in its document.
        sin_Td: their sines.
        attend: who sees whom.
    """

    cos_Td: Tensor
    sin_Td: Tensor
    attend: Attend


def plan_attention(
    batch: PackedBatch, config: ModelConfig, dtype: torch.dtype, ring: Ring | None = None
) -> AttentionPlan:
    """Rotary tables, and which tokens attend to which. Waits for no device.

    Args:
        batch: on the device of the model.
        config: the model.
        dtype: of the activations.
        ring: the batch's gang, which all of it takes part in; None where it has none.

    Raises:
        ValueError: the batch has a gang but there is no ring, or the other way round.
    """
    require(
        (batch.gang is None) == (ring is None),
        f"plan_attention: a batch of a gang must come with the gang's ring, got gang {batch.gang} and ring {ring}; "
        "give both or none",
    )
    device = batch.token_id_T.device
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    # Angles in float64: at position 100,000 a float32 angle is wrong by 0.01.
    position_T = batch.positions().to(device, non_blocking=True)
    exponent_d = torch.arange(config.head_dim // 2, dtype=torch.float64, device=device)
    angle_Td = position_T[:, None] * config.rope_theta ** (-2.0 * exponent_d / config.head_dim)
    cos_Td, sin_Td = angle_Td.cos().to(at_least_fp32), angle_Td.sin().to(at_least_fp32)
    return AttentionPlan(cos_Td, sin_Td, _attend_of(batch, ring, dtype, device))


def _attend_of(batch: PackedBatch, ring: Ring | None, dtype: torch.dtype, device: torch.device) -> Attend:
    if batch.gang is not None and ring is not None:
        return GangAttention(batch.gang.parts(), ring)
    offset_P1 = batch.offsets()
    if device.type == "cpu":
        sizes_P = offset_P1.diff()
        return DocumentAttention(torch.repeat_interleave(offset_P1[:-1], sizes_P), batch.rows())
    offsets = offset_P1.tolist()
    if dtype in FLASH_DTYPES:
        longest = max((end - begin for begin, end in pairwise(offsets)), default=0)
        return FlashDocumentAttention(offset_P1.to(device, non_blocking=True), longest)
    return EachDocumentAttention(offsets)


class DocumentAttention:
    """By moetrain's own kernel on the CPU."""

    def __init__(self, first_T: Tensor, offset_R1: Tensor) -> None:
        """As ``causal_attention`` takes them."""
        self.first_T, self.offset_R1 = first_T, offset_R1

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, memo: RoutingMemo | None) -> Tensor:
        """See ``Attend``."""
        return causal_attention(q_THd, k_TGd, v_TGd, self.first_T, self.offset_R1)


class FlashDocumentAttention:
    """By torch's FlashAttention over segments, on GPUs; no mask is made."""

    def __init__(self, offset_P1: Tensor, longest: int) -> None:
        """Prepare.

        Args:
            offset_P1: int32 on the device, where documents begin, and T.
            longest: tokens of the longest one.
        """
        self.offset_P1, self.longest = offset_P1, longest

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, memo: RoutingMemo | None) -> Tensor:
        """See ``Attend``."""
        if q_THd.shape[0] == 0:
            return _of_no_tokens(q_THd, k_TGd, v_TGd)
        ends, longest = self.offset_P1, self.longest
        y_THd: Tensor = FLASH_ATTENTION(q_THd, k_TGd, v_TGd, ends, ends, longest, longest, 0.0, True, False)[0]
        return y_THd


class EachDocumentAttention:
    """By torch's attention, one document after another: for types that FlashAttention does not take."""

    def __init__(self, offsets: Sequence[int]) -> None:
        """``offsets``: where documents begin, and T."""
        self.offsets = tuple(offsets)

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, memo: RoutingMemo | None) -> Tensor:
        """See ``Attend``."""
        if q_THd.shape[0] == 0:
            return _of_no_tokens(q_THd, k_TGd, v_TGd)
        found = []
        for begin, end in pairwise(self.offsets):
            q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (q_THd, k_TGd, v_TGd))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            found.append(y[0].transpose(0, 1))
        return torch.cat(found)


class GangAttention:
    """By a ring of ranks; none runs twice where activations are recomputed."""

    def __init__(self, parts: Zigzag, ring: Ring) -> None:
        """As ``ring_attention`` takes them."""
        self.parts, self.ring = parts, ring

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, memo: RoutingMemo | None) -> Tensor:
        """See ``Attend``."""
        keep = once_each_time if memo is None else partial(once, memo)
        return ring_attention(q_THd, k_TGd, v_TGd, self.parts, self.ring, once=keep)


def _of_no_tokens(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """Nothing, with queries, keys and values in its graph: fused kernels may refuse an empty batch."""
    return q_THd + (k_TGd.sum() + v_TGd.sum())


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

    def forward(
        self, x_tD: Tensor, plan: AttentionPlan, num_tokens: int | None = None, memo: RoutingMemo | None = None
    ) -> Tensor:
        """[t, D] -> [t, D]; there may be no tokens.

        Args:
            x_tD: this rank's tokens of those of its tp group.
            plan: of the forward pass.
            num_tokens: T; t where it is left out, which is right without tensor parallelism.
            memo: of the layer, where it is recomputed.
        """
        x_TD = self.tp.gather(x_tD, x_tD.shape[0] if num_tokens is None else num_tokens)
        y_THd = self._attend_heads(x_TD, plan, memo)
        return self.tp.scatter_sum(self.o(y_THd.flatten(1)))

    def _attend_heads(self, x_TD: Tensor, plan: AttentionPlan, memo: RoutingMemo | None) -> Tensor:
        """[T, D] -> [T, H, d] of the heads here."""
        q_THd, k_TGd, v_TGd = (
            projected.unflatten(-1, (-1, self.head_dim))
            for projected in (self.q(x_TD), self._project_used(self.k, x_TD), self._project_used(self.v, x_TD))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_THd, k_TGd = self.q_norm(q_THd), self.k_norm(k_TGd)
        q_THd, k_TGd = (rotate(x[None], plan.cos_Td[None], plan.sin_Td[None])[0] for x in (q_THd, k_TGd))
        if self._kv_of_head is not None:
            k_TGd, v_TGd = (x.index_select(1, self._kv_index(x_TD.device)) for x in (k_TGd, v_TGd))
        return plan.attend(q_THd, k_TGd, v_TGd, memo)

    @torch.inference_mode(False)  # the first caller may be an evaluation, the second one trains
    def _kv_index(self, device: torch.device) -> Tensor:
        """Which key head each query head reads, copied to the device once: a copy waits for it."""
        if self._kv_on_device is None or self._kv_on_device.device != device:
            self._kv_on_device = torch.tensor(self._kv_of_head, device=device)
        return self._kv_on_device

    def _project_used(self, projection: nn.Linear, x_TD: Tensor) -> Tensor:
        """Keys or values of the heads that are read here."""
        if self._num_kv_used == self._kv_heads.size:
            return projection(x_TD)
        begin = self._kv_first * self.head_dim
        rows = slice(begin, begin + self._num_kv_used * self.head_dim)
        bias = None if projection.bias is None else projection.bias[rows]
        return functional.linear(x_TD, projection.weight[rows], bias)


def _kv_heads(config: ModelConfig, tp: TensorParallel) -> Cut:
    """The heads of keys and values whose weights this rank has: all where they do not divide over the group."""
    if config.num_kv_heads % tp.size == 0:
        return tp.cut(0, config.num_kv_heads)
    return Cut(0, 0, config.num_kv_heads, config.num_kv_heads)


def _in_elements(heads: Cut, dim: int, head_dim: int) -> Cut:
    return Cut(dim, heads.start * head_dim, heads.size * head_dim, heads.total * head_dim)
