"""The decoder-only transformer as a function of its parameters, one document and one expert at a time.

Shapes: T tokens of a micro-batch, S tokens of one document, D width, H heads, E experts, F hidden width, V vocabulary.
Everything computes in the dtype of the parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moetrain.config import ModelConfig, MoEConfig, MoELayerConfig
from moetrain.oracle.capacity import keep_within_capacity
from moetrain.oracle.random import key_of, uniform
from moetrain.oracle.rounding import round_weights
from moetrain.oracle.routing import auxiliary_loss, choose

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Document:
    """One stretch of text that attends to itself alone."""

    token_id_S: Tensor  # int64
    target_S: Tensor  # int64, the token to predict; -1 where nothing is to be predicted
    position_S: Tensor  # int64, for the rotary embedding


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The documents that pass through the model together: one rank, one round. May hold no document.

    Methods that look at a set of tokens (rounding, capacity) have their domains: where these are not the micro-batches
    of single ranks, it holds all documents of the round, and says which domain each token is in.
    """

    documents: tuple[Document, ...]
    rank_documents: tuple[int, ...] = ()  # documents of each rank; all of one rank if left out
    round_idx: int = 0  # which of the step's rounds, for what is random
    domain_T: tuple[int, ...] | None = None  # of each token; all one domain if left out
    domain_slots: tuple[int, ...] | None = None  # places for tokens, padding too, by domain; the tokens if left out

    def domains(self) -> list[tuple[Tensor, int]]:
        """Of each domain that has tokens, their indices and the domain's places."""
        domain_T = torch.tensor(self.domain_T or (0,) * self.num_tokens, dtype=torch.int64)
        found = [(domain, (domain_T == domain).nonzero()[:, 0]) for domain in sorted(set(domain_T.tolist()))]
        return [(index_N, self.domain_slots[d] if self.domain_slots else len(index_N)) for d, index_N in found]

    @property
    def rank_tokens(self) -> list[int]:
        """Tokens of each rank."""
        lengths = [document.token_id_S.numel() for document in self.documents]
        ends = list(accumulate(self.rank_documents or (len(lengths),)))
        return [sum(lengths[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def num_tokens(self) -> int:
        """Tokens, with and without a target."""
        return sum(document.token_id_S.numel() for document in self.documents)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that have a target."""
        return sum(int((document.target_S >= 0).sum()) for document in self.documents)


@dataclass(frozen=True, slots=True)
class BalanceInputs:
    """What balancing brings from earlier optimizer steps, by MoE layer."""

    lagged_count_E: Mapping[int, Tensor]  # int64, choices of the previous step over all ranks
    bias_E: Mapping[int, Tensor]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What one micro-batch adds to the loss of its step."""

    ce_sum: Tensor  # cross-entropy, summed over the tokens that have a target
    aux: Tensor  # balance and z losses over all layers, already divided by the tokens of the step
    count_E: dict[int, Tensor]  # layer -> int64 choices
    gap: float  # the narrowest decision of any router


def loss_terms(
    params: Parameters,
    model: ModelConfig,
    config: MoELayerConfig,
    batch: MicroBatch,
    balance: BalanceInputs,
    num_step_tokens: int,
    random_key: int = 0,
) -> LossTerms:
    """Forward pass of one micro-batch.

    Args:
        params: Full tensors by logical name.
        model: The transformer.
        config: Its experts and routers.
        batch: Documents; those of one rank are the domain of the ``micro`` balance loss.
        balance: Counts and biases of earlier steps.
        num_step_tokens: Tokens of the whole optimizer step, over all ranks and rounds.
        random_key: Of (seed, step, round).
    """
    zero = params["embed.weight"].new_zeros(())
    empty_E = {layer: torch.zeros(config.moe.num_experts, dtype=torch.int64) for layer in model.moe_layers}
    if not batch.documents:
        return LossTerms(zero, zero, empty_E, float("inf"))
    lengths = [document.token_id_S.numel() for document in batch.documents]
    x_TD = params["embed.weight"][torch.cat([document.token_id_S for document in batch.documents])]
    aux, count_E, gap = zero, dict(empty_E), float("inf")
    for layer in range(model.num_layers):
        prefix = f"layers.{layer}"
        normed_TD = rms_norm(x_TD, params[f"{prefix}.attn_norm.weight"], model.norm_eps)
        attended = [
            attention(params, f"{prefix}.attn", model, normed_SD, document.position_S)
            for normed_SD, document in zip(normed_TD.split(lengths), batch.documents, strict=True)
        ]
        x_TD = x_TD + torch.cat(attended)
        normed_TD = rms_norm(x_TD, params[f"{prefix}.mlp_norm.weight"], model.norm_eps)
        if layer not in model.moe_layers:
            w_in, w_out = params[f"{prefix}.mlp.w_in"], params[f"{prefix}.mlp.w_out"]
            x_TD = x_TD + mlp(normed_TD, w_in, w_out, config.moe.activation)
            continue
        logit_TE = normed_TD @ params[f"{prefix}.moe.router.weight"].T
        weights = []
        for rank_logit_TE in logit_TE.split(batch.rank_tokens):
            choice = choose(rank_logit_TE, config, balance.bias_E[layer])
            aux = aux + auxiliary_loss(rank_logit_TE, choice, config, balance.lagged_count_E[layer], num_step_tokens)
            count_E[layer], gap = count_E[layer] + choice.count_E, min(gap, choice.gap)
            weights.append((choice.chosen_TE, choice.weight_TE))
        chosen_TE, weight_TE = (torch.cat(parts) for parts in zip(*weights, strict=True))
        if config.dispatch.rounding != "none" or config.dispatch.capacity_factor is not None:
            key = key_of(random_key, "rounding", layer)
            draw_E = [uniform(key, expert) for expert in range(config.moe.num_experts)]
            weight_TE, set_gap = choose_among_sets(batch, logit_TE, chosen_TE, weight_TE, config, draw_E)
            gap = min(gap, set_gap)
        x_TD = x_TD + experts(params, f"{prefix}.moe", config.moe, normed_TD, weight_TE)
    x_TD = rms_norm(x_TD, params["final_norm.weight"], model.norm_eps)
    head = params["embed.weight" if model.tie_embeddings else "lm_head.weight"]
    target_T = torch.cat([document.target_S for document in batch.documents])
    return LossTerms(cross_entropy_sum(x_TD @ head.T, target_T), aux, count_E, gap)


def choose_among_sets(
    batch: MicroBatch,
    logit_TE: Tensor,
    chosen_TE: Tensor,
    weight_TE: Tensor,
    config: MoELayerConfig,
    draw_E: list[float],
) -> tuple[Tensor, float]:
    """Apply rounding, or capacity, to each domain by itself; the weights that come of it, and the least gap."""
    kept_TE, gap = torch.zeros_like(weight_TE), float("inf")
    for index_N, slots in batch.domains():
        given = (logit_TE[index_N], chosen_TE[index_N], weight_TE[index_N])
        if config.dispatch.rounding != "none":
            weight_NE, set_gap = round_weights(*given, config, draw_E)
        else:
            weight_NE, set_gap = keep_within_capacity(*given[1:], config, slots)
        kept_TE = kept_TE.index_copy(0, index_N, weight_NE)
        gap = min(gap, set_gap)
    return kept_TE, gap


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def attention(params: Parameters, prefix: str, model: ModelConfig, x_SD: Tensor, position_S: Tensor) -> Tensor:
    """Causal grouped-query attention inside one document, with the softmax written out.

    Head h reads the keys and values of head h // (num_heads / num_kv_heads).
    """

    def project(name: str, num_heads: int) -> Tensor:
        y = x_SD @ params[f"{prefix}.{name}.weight"].T
        if model.qkv_bias:
            y = y + params[f"{prefix}.{name}.bias"]
        return y.view(len(x_SD), num_heads, model.head_dim)

    query, key = project("q", model.num_heads), project("k", model.num_kv_heads)
    value = project("v", model.num_kv_heads)
    if model.qk_norm:
        query = rms_norm(query, params[f"{prefix}.q_norm.weight"], model.norm_eps)
        key = rms_norm(key, params[f"{prefix}.k_norm.weight"], model.norm_eps)
    query, key = rotate(query, position_S, model.rope_theta), rotate(key, position_S, model.rope_theta)
    num_readers = model.num_heads // model.num_kv_heads
    key, value = key.repeat_interleave(num_readers, dim=1), value.repeat_interleave(num_readers, dim=1)
    future_SS = torch.ones(len(x_SD), len(x_SD), dtype=torch.bool).triu(diagonal=1)
    score_HSS = torch.einsum("qhd,khd->hqk", query, key) / model.head_dim**0.5
    share_HSS = score_HSS.masked_fill(future_SS, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", share_HSS, value).flatten(1) @ params[f"{prefix}.o.weight"].T


def rotate(x: Tensor, position_S: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [S, heads, d]: elements i and i + d/2 turn by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = position_S.to(x.dtype)[:, None, None] * frequency
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def mlp(x_TD: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """w_out @ activation(w_in @ x): swiglu silu(gate) * up, gelu the exact erf form, relu2 relu(x)^2.

    Args:
        x_TD: Tokens.
        w_in: [2, F, D] (gate, up) for swiglu, else [1, F, D].
        w_out: [D, F].
        activation: Its name.
    """
    if activation == "swiglu":
        gate_TF, up_TF = x_TD @ w_in[0].T, x_TD @ w_in[1].T
        hidden_TF = gate_TF * gate_TF.sigmoid() * up_TF
    elif activation == "gelu":
        pre_TF = x_TD @ w_in[0].T
        hidden_TF = pre_TF * (1 + torch.erf(pre_TF / 2**0.5)) / 2
    else:
        hidden_TF = (x_TD @ w_in[0].T).clamp(min=0).square()
    return hidden_TF @ w_out.T


def experts(params: Parameters, prefix: str, moe: MoEConfig, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
    """Sum over all experts of weight * expert(x), plus the shared expert where there is one."""
    w_in, w_out = params[f"{prefix}.experts.w_in"], params[f"{prefix}.experts.w_out"]
    y_TD = torch.zeros_like(x_TD)
    for expert in range(moe.num_experts):
        y_TD = y_TD + weight_TE[:, expert, None] * mlp(x_TD, w_in[expert], w_out[expert], moe.activation)
    if not moe.shared_hidden:
        return y_TD
    shared_TD = mlp(x_TD, params[f"{prefix}.shared.w_in"], params[f"{prefix}.shared.w_out"], moe.activation)
    if moe.shared_gate:
        shared_TD = (x_TD @ params[f"{prefix}.shared.gate"].T).sigmoid() * shared_TD
    return y_TD + shared_TD


def cross_entropy_sum(logit_TV: Tensor, target_T: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over the tokens whose target is not -1."""
    has_target_T = target_T >= 0
    logit_TV, target_T = logit_TV[has_target_T], target_T[has_target_T]
    return (logit_TV.logsumexp(dim=-1) - logit_TV.gather(1, target_T[:, None])[:, 0]).sum()
