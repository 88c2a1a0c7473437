"""A MoE layer written as loops over tokens and experts, in plain torch: what the package is compared with."""

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.config import MoELayerConfig


def scores(logits_TE: Tensor, config: MoELayerConfig) -> Tensor:
    return logits_TE.sigmoid() if config.router.score == "sigmoid" else logits_TE.softmax(-1)


def chosen(score_E: list[float], top_k: int) -> list[int]:
    """Highest score first, ties to the lower id."""
    return sorted(range(len(score_E)), key=lambda e: (-score_E[e], e))[:top_k]


def weights_of(logits_E: Tensor, score_E: Tensor, ids: list[int], config: MoELayerConfig) -> Tensor:
    if config.router.score == "topk_softmax":
        return logits_E[ids].softmax(-1) * config.router.weight_scale
    picked = shares(logits_E[ids], config) if config.router.renormalise else score_E[ids]
    return picked * config.router.weight_scale


def shares(logits_E: Tensor, config: MoELayerConfig) -> Tensor:
    """Each score over their sum, as 1 over the sum of ratios to it: no score is so small that this is lost."""
    log_E = functional.logsigmoid(logits_E) if config.router.score == "sigmoid" else logits_E
    return 1 / torch.exp(log_E[None, :] - log_E[:, None]).sum(1)


def act(h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = h[: len(h) // 2], h[len(h) // 2 :]
        return gate * torch.sigmoid(gate) * up
    if activation == "gelu":
        return 0.5 * h * (1 + torch.erf(h / 2**0.5))
    return torch.clamp(h, min=0) ** 2


def expert(x_D: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """w_in [2 or 1, F, D], w_out [D, F]."""
    return w_out @ act(w_in.reshape(-1, w_in.shape[-1]) @ x_D, activation)


def layer(
    x_TD: Tensor,
    params: dict[str, Tensor],
    config: MoELayerConfig,
    *,
    valid: list[bool],
    num_step_tokens: int,
    share_E: Tensor | None = None,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, auxiliary loss and counts. ``params``: router, w_in, w_out and optionally the shared expert's."""
    num_experts = config.moe.num_experts
    logits_TE = x_TD @ params["router"].T
    score_TE = scores(logits_TE, config)
    steered_TE = (logits_TE if config.router.score == "topk_softmax" else score_TE).detach().clone()
    if bias_E is not None:
        steered_TE += bias_E
    count_E = torch.zeros(num_experts, dtype=torch.int64)
    prob_sum_E = torch.zeros(num_experts, dtype=x_TD.dtype)
    z_sum = torch.zeros((), dtype=x_TD.dtype)
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D) + 0.0 * x_D
        if valid[t]:
            ids = chosen(steered_TE[t].tolist(), config.moe.top_k)
            for e, weight in zip(ids, weights_of(logits_TE[t], score_TE[t], ids, config), strict=True):
                y_D = y_D + weight * expert(x_D, params["w_in"][e], params["w_out"][e], config.moe.activation)
                count_E[e] += 1
            prob_sum_E = prob_sum_E + shares(logits_TE[t], config)
            z_sum = z_sum + torch.log(torch.exp(logits_TE[t]).sum()) ** 2
        if "shared.w_in" in params:
            extra = expert(x_D, params["shared.w_in"], params["shared.w_out"], config.moe.activation)
            gate = torch.sigmoid(params["shared.gate"][0] @ x_D) if "shared.gate" in params else 1.0
            y_D = y_D + gate * extra
        rows.append(y_D)
    if config.balance.scope == "none":
        share_E = torch.zeros(num_experts)
    elif config.balance.scope == "micro":
        share_E = count_E.double() / max(1, int(count_E.sum()))
    elif share_E is None:
        share_E = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    balance = num_experts * (share_E.to(x_TD.dtype) * prob_sum_E).sum()
    aux = (config.balance.coef * balance + config.balance.z_loss_coef * z_sum) / num_step_tokens
    y_TD = torch.stack(rows) if rows else functional.linear(x_TD, torch.eye(x_TD.shape[1], dtype=x_TD.dtype))
    return y_TD, aux, count_E
