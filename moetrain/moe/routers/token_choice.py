"""Token choice: every token takes its K best experts. Shapes: T tokens, E experts, K top-k."""

from torch import Tensor

from moetrain.config import RouterConfig
from moetrain.moe.context import MoEContext
from moetrain.moe.routers.contract import RouterStatistics
from moetrain.moe.routing import Routing
from moetrain.ops import route


class TokenChoice:
    """The K highest biased scores of each token, weighed by the unbiased ones; ties go to the lower expert id.

    Each token is chosen for alone: no partition of the batch changes a choice.
    """

    def __init__(self, top_k: int, config: RouterConfig) -> None:
        """``top_k`` is K; ``config`` says how logits become scores and weights."""
        self._top_k = top_k
        self._config = config

    def choose(self, logits_TE: Tensor, ctx: MoEContext, bias_E: Tensor | None) -> tuple[Routing, RouterStatistics]:
        """See ``RoutingMethod``."""
        config = self._config
        routed = route(
            logits_TE,
            self._top_k,
            score=config.score,
            bias_E=bias_E,
            num_groups=config.num_groups,
            groups_kept=config.groups_kept,
            group_rule=config.group_rule,
            renormalise=config.renormalise,
            scale=config.weight_scale,
            valid_T=ctx.valid_T,
        )
        # All tokens are one segment. No view of it: FSDP puts hooks on the tensors that its modules return, which an
        # operation in place on a view would drop.
        statistics = RouterStatistics(routed.count_GE[0], routed.prob_sum_GE.sum(0), routed.bad_1)
        return Routing(
            routed.token_N, routed.weight_N, routed.offset_E1, ctx.token_gid_T2, logits_TE.shape[0]
        ), statistics
