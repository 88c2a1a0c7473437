"""The definition of causal_attention, with all scores at once. Shapes as in ``moetrain.ops.causal_attention``."""

import torch
from torch import Tensor


def causal_attention_reference(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, first_T: Tensor, *, scale: float | None = None
) -> Tensor:
    """Softmax over the keys of the query's document up to the query, times the values."""
    group = q_THd.shape[1] // k_TGd.shape[1]
    k_THd, v_THd = (x.repeat_interleave(group, dim=1) for x in (k_TGd, v_TGd))
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THd, k_THd) * (q_THd.shape[-1] ** -0.5 if scale is None else scale)
    token_T = torch.arange(q_THd.shape[0], device=q_THd.device)
    seen_TT = (token_T <= token_T[:, None]) & (token_T >= first_T[:, None])
    weight_HTT = scores_HTT.masked_fill(~seen_TT, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weight_HTT, v_THd)
