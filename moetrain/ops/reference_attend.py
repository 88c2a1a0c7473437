"""The definition of attend, with all scores at once. Shapes as in ``moetrain.ops.attend``."""

import torch
from torch import Tensor


def seen_by_segments(
    num_queries: int, num_keys: int, range_q_S2: Tensor, range_k_S2: Tensor, *, causal: bool
) -> Tensor:
    """Which keys each query sees: bool [Q, K]."""
    seen_QK = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for (q_begin, q_end), (k_begin, k_end) in zip(range_q_S2.tolist(), range_k_S2.tolist(), strict=True):
        part = torch.ones(q_end - q_begin, k_end - k_begin, dtype=torch.bool)
        seen_QK[q_begin:q_end, k_begin:k_end] |= part.tril() if causal else part
    return seen_QK


def attend_reference(
    q_QHd: Tensor, k_KGd: Tensor, v_KGd: Tensor, seen_QK: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that each query sees, times the values; 0 and -inf for one that sees none."""
    group = q_QHd.shape[1] // k_KGd.shape[1]
    k_KHd, v_KHd = (x.repeat_interleave(group, dim=1) for x in (k_KGd, v_KGd))
    scores_HQK = torch.einsum("qhd,khd->hqk", q_QHd, k_KHd) * (q_QHd.shape[-1] ** -0.5 if scale is None else scale)
    hidden_HQK = scores_HQK.masked_fill(~seen_QK, float("-inf"))
    lse_HQ = hidden_HQK.logsumexp(dim=-1)
    weight_HQK = torch.where(seen_QK.any(1)[:, None], (hidden_HQK - lse_HQ[..., None]).exp(), 0.0)
    return torch.einsum("hqk,khd->qhd", weight_HQK, v_KHd), lse_HQ
