"""The MoE layer: route, dispatch, run experts, combine. Shapes: T tokens, D width, E experts."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from moetrain.config import MoELayerConfig
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.moe.balance.losses import BalanceLosses
from moetrain.moe.balance.state import LayerBalance
from moetrain.moe.context import MoEContext, RoutingMemo, once
from moetrain.moe.dispatch.contract import Dispatcher, ExpertRows
from moetrain.moe.experts import (
    ExpertWeightsProvider,
    LayerUse,
    SharedExpert,
    WeightStream,
    run_experts,
    use_experts,
)
from moetrain.moe.routers.contract import RouterStatistics
from moetrain.moe.routers.make import make_router
from moetrain.moe.routing import Routing
from moetrain.moe.rules.contract import RoutingRule, RuleOutcome
from moetrain.placement.loads import ExpertLoads
from moetrain.placement.placement import Placement


@dataclass(frozen=True, slots=True, eq=False)
class LayerServices:
    """What one MoE layer is given beside its configuration: all that knows of ranks, and of other steps.

    Args:
        experts: who has the routed experts' weights.
        dispatcher: brings tokens to them.
        balance: what this layer remembers between steps.
        rules: change the router's choice in training, one after another.
        tp: the ranks that have the other tokens of a micro-batch, and parts of the shared expert.
        loads: counts what training micro-batches send to each expert; None where nobody asks.
    """

    experts: ExpertWeightsProvider
    dispatcher: Dispatcher
    balance: LayerBalance
    rules: tuple[RoutingRule, ...] = ()
    tp: TensorParallel = field(default_factory=TensorParallel)
    loads: ExpertLoads | None = None


# A better placement for a layer's pairs of this micro-batch, (layer, where each expert's begin, present one); None to
# stay. Collective.
Calibrate = Callable[[int, Tensor, Placement | None], Placement | None]


class MoELayer(nn.Module):
    """Tokens in, tokens out; where experts live is the business of whoever has their weights, and the dispatcher's.

    Its parameters are ``router.weight`` and, with a shared expert, ``shared.w_in``, ``shared.w_out`` and
    ``shared.gate``. Routed experts belong to ``services.experts``.
    """

    def __init__(self, width: int, config: MoELayerConfig, layer_idx: int, services: LayerServices) -> None:
        """``width`` is D."""
        super().__init__()
        self.layer_idx = layer_idx
        moe, tp = config.moe, services.tp
        self.router = make_router(config, width)
        self.shared: SharedExpert | None = None
        if moe.shared_hidden:
            self.shared = SharedExpert(width, moe.shared_hidden, moe.activation, gate=moe.shared_gate, tp=tp)
        self.dispatcher = services.dispatcher
        self.rules = services.rules
        self._experts = services.experts
        self._balance = services.balance
        self._loads = services.loads
        self.calibrate: Calibrate | None = None
        self._losses = BalanceLosses(config.balance, tp)
        self._moe = moe

    def begin(self, x_TD: Tensor, memo: RoutingMemo | None = None) -> tuple[Tensor, LayerUse]:
        """Begin a micro-batch: weights that are elsewhere are on their way from now on.

        Whoever has something to compute before the layer, attention say, begins first and hands the use to
        ``forward``, and calls its ``before_experts`` and ``after_experts`` around it (``placement.use``).

        Args:
            x_TD: what is on the residual path now.
            memo: as in ``forward``.

        Returns:
            ``x_TD`` to go on with, and the use.
        """
        use = once(memo, "weights", lambda: self._begin(memo))
        return use.begin(x_TD), use

    def _begin(self, memo: RoutingMemo | None) -> LayerUse:
        placement = self.dispatcher.placement()
        return use_experts(self._experts, self.layer_idx, placement, recomputes=memo is not None)

    def forward(
        self, x_TD: Tensor, ctx: MoEContext, memo: RoutingMemo | None = None, use: LayerUse | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one micro-batch.

        Args:
            x_TD: tokens; T may be 0, and every rank of the dispatch group must call all the same.
            ctx: the micro-batch.
            memo: a fresh one per (layer, micro-batch) under activation checkpointing, else None.
            use: what ``begin`` gave; None to begin here.

        Returns:
            y_TD, and the scalar auxiliary loss, which ranks and micro-batches sum.

        Raises:
            FloatingPointError: on every rank of the dispatch group, if a router logit is NaN or Inf on one of them.
                Where nothing tells the host (experts are local and on an accelerator, or dispatch is padded),
                ``BalanceState.finish_step`` raises it instead.
        """
        if use is None:
            x_TD, use = self.begin(x_TD, memo)
            y_TD, aux = self(use.before_experts(x_TD), ctx, memo, use)
            return use.after_experts(y_TD), aux
        balance = self._balance
        routed = self.router(x_TD, ctx, balance.selection_bias())
        aux = self._losses.total(routed, ctx, balance.share())
        routing, outcomes = self._apply_rules(routed.routing, routed.logits_TE, ctx, memo)
        if ctx.training and self.calibrate is not None:
            self._calibrate(routing, use, memo)
        pending = self.dispatcher.dispatch(x_TD, routing, routed.statistics.bad_1, memo, use.placement)
        self._refuse_bad(pending.bad_ranks)
        if ctx.training:
            read = pending.bad_ranks is not None
            once(memo, "statistics", lambda: self._count(routed.statistics, routing, outcomes, read=read))
        # While dispatch is pending: what does not need its rows.
        shared_TD = None if self.shared is None else self.shared(x_TD, ctx.num_tokens)
        weights, moe = use.weights(), self._moe

        def experts(rows: ExpertRows) -> Tensor:
            pairs = (rows.row_N, rows.weight_N, rows.offset_e1)
            return use.run(lambda: run_experts(rows.x_RD, *pairs, weights, moe.activation, moe.recompute_hidden))

        y_TD = pending.combine(experts)
        return y_TD if shared_TD is None else y_TD + shared_TD, aux

    def _apply_rules(
        self, routing: Routing, logits_TE: Tensor, ctx: MoEContext, memo: RoutingMemo | None
    ) -> tuple[Routing, list[RuleOutcome]]:
        outcomes = []
        for rule in self.rules if ctx.training else ():
            outcome = rule.apply(routing, logits_TE, ctx, self.layer_idx, memo)
            outcomes.append(outcome)
            routing = outcome.routing
        return routing, outcomes

    def _calibrate(self, routing: Routing, use: LayerUse, memo: RoutingMemo | None) -> None:
        """Move the use to a placement for the loads that the router has made, where that pays; once."""

        def replan() -> None:
            assert self.calibrate is not None
            better = self.calibrate(self.layer_idx, routing.offset_E1, use.placement)
            if better is not None and isinstance(self._experts, WeightStream):
                self._experts.replan(use, better)

        once(memo, "calibrated", replan)

    def _refuse_bad(self, bad_ranks: tuple[int, ...] | None) -> None:
        if bad_ranks:
            raise FloatingPointError(
                f"MoE layer {self.layer_idx}: router logits hold NaN or Inf on rank(s) {list(bad_ranks)}; lower the "
                "learning rate, or look at the layers before this one"
            )

    def _count(
        self, statistics: RouterStatistics, routing: Routing, outcomes: list[RuleOutcome], *, read: bool
    ) -> None:
        """Count a training micro-batch, once: the caller asks for no count of a recomputation."""
        self._balance.add(statistics.count_E)
        if self._loads is not None:
            self._loads.add(self.layer_idx, routing.offset_E1)
        for outcome in outcomes:
            self._balance.add_changes(outcome.added_E, outcome.dropped_E)
        if not read:
            self._balance.add_bad(statistics.bad_1)
