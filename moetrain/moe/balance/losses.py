"""Auxiliary losses of a layer's router. Shapes: T tokens, E experts."""

from dataclasses import dataclass, field

from torch import Tensor

from moetrain.config import BalanceConfig
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.moe.context import MoEContext
from moetrain.moe.routers.contract import RouterOutput


@dataclass(frozen=True, slots=True, eq=False)
class BalanceLosses:
    """Balance loss and z-loss with their coefficients.

    Args:
        config: scope and coefficients.
        tp: the ranks that have the other tokens of a micro-batch.
    """

    config: BalanceConfig
    tp: TensorParallel = field(default_factory=TensorParallel)

    def total(self, routed: RouterOutput, ctx: MoEContext, share_E: Tensor) -> Tensor:
        """Both, divided by the step's tokens, so that ranks and micro-batches may be summed.

        Args:
            routed: the layer's choice for one micro-batch.
            ctx: the micro-batch.
            share_E: each expert's share of the previous step's choices, summing to 1 (scope ``lagged``).
        """
        count_E, prob_sum_E = routed.statistics.count_E, routed.statistics.prob_sum_E
        if self.config.scope == "micro":
            count_E = self.tp.all_reduce(count_E.clone())
            share_E = count_E.double() / count_E.sum().clamp(min=1)
        coef = 0.0 if self.config.scope == "none" else self.config.coef
        aux = load_balance_loss(prob_sum_E, share_E, coef) + z_loss(
            routed.logits_TE, ctx.valid_T, self.config.z_loss_coef
        )
        return aux / max(1, ctx.num_step_tokens)


def load_balance_loss(prob_sum_E: Tensor, share_E: Tensor, coef: float) -> Tensor:
    """Coef * E * sum_i f_i P_i, in units of tokens: coef times the tokens where f is even (2501.11873).

    Args:
        prob_sum_E: P, summed over tokens.
        share_E: f, summing to 1; it carries no gradient.
        coef: 1 for a loss of 1 per token at perfect balance.
    """
    return coef * prob_sum_E.shape[0] * (share_E.detach().to(prob_sum_E.dtype) * prob_sum_E).sum()


def z_loss(logits_TE: Tensor, valid_T: Tensor, coef: float) -> Tensor:
    """Coef times the sum over valid tokens of the squared log of the softmax's denominator (ST-MoE, 2202.08906)."""
    log_z_T = logits_TE.logsumexp(dim=-1)
    return coef * log_z_T.square().masked_fill(~valid_T, 0.0).sum()
