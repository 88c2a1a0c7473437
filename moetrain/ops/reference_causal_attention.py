"""The definition of causal_attention, with all scores at once. Shapes as in ``moetrain.ops.causal_attention``."""

import torch
from torch import Tensor


def causal_attention_reference(
    q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, first_BS: Tensor, *, scale: float | None = None
) -> Tensor:
    """Softmax over the keys of the query's document up to the query, times the values."""
    group, length = q_BSHd.shape[2] // k_BSGd.shape[2], q_BSHd.shape[1]
    k_BSHd, v_BSHd = (x.repeat_interleave(group, dim=2) for x in (k_BSGd, v_BSGd))
    scores_BHSS = torch.einsum("bqhd,bkhd->bhqk", q_BSHd, k_BSHd) * (
        q_BSHd.shape[-1] ** -0.5 if scale is None else scale
    )
    token_S = torch.arange(length, device=q_BSHd.device)
    seen_BSS = (token_S <= token_S[:, None]) & (token_S >= first_BS[:, :, None])
    weight_BHSS = scores_BHSS.masked_fill(~seen_BSS[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weight_BHSS, v_BSHd)
