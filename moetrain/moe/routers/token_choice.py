"""Scores tokens, chooses experts, and says how unbalanced that was. Shapes: T tokens, D width, E experts, K top-k."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.config import MoELayerConfig
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.moe.context import MoEContext
from moetrain.moe.routing import Routing
from moetrain.moe.rules.rounding import rounding_score
from moetrain.ops import route


@dataclass(frozen=True, slots=True, eq=False)
class RouterOutput:
    """The choice of one layer for one micro-batch.

    Args:
        routing: the pairs.
        aux: scalar, balance loss and z-loss with their coefficients, already divided by the step's tokens.
        count_E: int64, choices per expert among this micro-batch's valid tokens.
        bad_1: above 0 where a logit was NaN or Inf.
        score_TE: what token rounding ranks and weighs by; None where nothing is to be rounded.
    """

    routing: Routing
    aux: Tensor
    count_E: Tensor
    bad_1: Tensor
    score_TE: Tensor | None = None


class Router(nn.Module):
    """A linear router in at least float32. ``weight`` [E, D] is zero until the model fills it."""

    def __init__(self, config: MoELayerConfig, width: int, layer_idx: int, tp: TensorParallel | None = None) -> None:
        """``tp``: the ranks that have the other tokens of a micro-batch."""
        super().__init__()
        self.config = config
        self._tp = tp or TensorParallel()
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.zeros(config.moe.num_experts, width))

    def forward(
        self,
        x_TD: Tensor,
        ctx: MoEContext,
        share_E: Tensor,
        bias_E: Tensor | None = None,
    ) -> RouterOutput:
        """Choose experts for every valid token.

        Under activation checkpointing the choice is saved (``saved_ops``), so that a recomputation replays it.

        Args:
            x_TD: tokens, any floating dtype.
            ctx: the micro-batch.
            share_E: each expert's share of the previous step's choices, summing to 1 (scope ``lagged``).
            bias_E: added to scores for selection only (loss-free balancing), or None.
        """
        config = self.config
        at_least_fp32 = torch.promote_types(torch.promote_types(x_TD.dtype, self.weight.dtype), torch.float32)
        logits_TE = functional.linear(x_TD.to(at_least_fp32), self.weight.to(at_least_fp32))
        routed = route(
            logits_TE,
            config.moe.top_k,
            score=config.router.score,
            bias_E=None if bias_E is None else bias_E.to(at_least_fp32),
            num_groups=config.router.num_groups,
            groups_kept=config.router.groups_kept,
            group_rule=config.router.group_rule,
            renormalise=config.router.renormalise,
            scale=config.router.weight_scale,
            valid_T=ctx.valid_T,
        )
        routing = Routing(routed.token_N, routed.weight_N, routed.offset_E1, ctx.token_gid_T2, x_TD.shape[0])
        count_E = routed.count_GE[0]
        aux = self._balance_loss(routed.prob_sum_GE[0], count_E, share_E) + self._z_loss(logits_TE, ctx.valid_T)
        rounds = config.dispatch.rounding != "none" and ctx.training
        score_TE = rounding_score(logits_TE, config.router) if rounds else None
        return RouterOutput(routing, aux / max(1, ctx.num_step_tokens), count_E, routed.bad_1, score_TE)

    def _balance_loss(self, prob_sum_E: Tensor, count_E: Tensor, share_E: Tensor) -> Tensor:
        """E * sum_i f_i P_i, in units of tokens; f carries no gradient (2501.11873)."""
        if self.config.balance.scope == "micro":
            count_E = self._tp.all_reduce(count_E.clone())
            share_E = count_E.double() / count_E.sum().clamp(min=1)
        coef = 0.0 if self.config.balance.scope == "none" else self.config.balance.coef
        return coef * self.config.moe.num_experts * (share_E.detach().to(prob_sum_E.dtype) * prob_sum_E).sum()

    def _z_loss(self, logits_TE: Tensor, valid_T: Tensor) -> Tensor:
        """Sum over valid tokens of the squared log of the softmax's denominator (ST-MoE)."""
        log_z_T = logits_TE.logsumexp(dim=-1)
        return self.config.balance.z_loss_coef * log_z_T.square().masked_fill(~valid_T, 0.0).sum()
