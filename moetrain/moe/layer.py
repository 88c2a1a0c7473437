"""The MoE layer: route, dispatch, run experts, combine. Shapes: T tokens, D width, E experts."""

import torch
from torch import Tensor, nn

from moetrain.config import ModelConfig, MoELayerConfig
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.moe.balance.state import BalanceState
from moetrain.moe.context import MoEContext, RoutingMemo, once
from moetrain.moe.dispatch.contract import Dispatcher, ExpertRows
from moetrain.moe.experts import SharedExpert, run_experts
from moetrain.moe.routers.token_choice import Router, RouterOutput
from moetrain.moe.rules.capacity import drop_beyond_capacity
from moetrain.moe.rules.rounding import Rounded, Rounding
from moetrain.placement.store import ExpertStore


class MoELayer(nn.Module):
    """Tokens in, tokens out; where experts live is the store's and the dispatcher's business.

    Its parameters are ``router.weight`` and, with a shared expert, ``shared.w_in``, ``shared.w_out`` and
    ``shared.gate``. Routed experts belong to the store.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: MoELayerConfig,
        layer_idx: int,
        store: ExpertStore,
        dispatcher: Dispatcher,
        balance: BalanceState,
        rounding: Rounding | None = None,
        tp: TensorParallel | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.router = Router(config, model.width, layer_idx, tp)
        self.shared: SharedExpert | None = None
        moe = config.moe
        if moe.shared_hidden:
            self.shared = SharedExpert(model.width, moe.shared_hidden, moe.activation, gate=moe.shared_gate, tp=tp)
        self._config = config
        self._store = store
        self.dispatcher = dispatcher
        self._balance = balance
        self.rounding = rounding

    def forward(self, x_TD: Tensor, ctx: MoEContext, memo: RoutingMemo | None = None) -> tuple[Tensor, Tensor]:
        """Run one micro-batch.

        Args:
            x_TD: tokens; T may be 0, and every rank of the dispatch group must call all the same.
            ctx: the micro-batch.
            memo: a fresh one per (layer, micro-batch) under activation checkpointing, else None.

        Returns:
            y_TD, and the scalar auxiliary loss, which ranks and micro-batches sum.

        Raises:
            FloatingPointError: on every rank of the dispatch group, if a router logit is NaN or Inf on one of them.
                Where nothing tells the host (experts are local and on an accelerator, or dispatch is padded),
                ``BalanceState.finish_step`` raises it instead.
        """
        balance = self._balance
        routed = self.router(x_TD, ctx, balance.share(self.layer_idx), balance.bias(self.layer_idx))
        rounded: Rounded | None = None
        if self.rounding is not None and routed.score_TE is not None:
            rounded = self.rounding.apply(routed.routing, routed.score_TE, ctx, self.layer_idx, memo)
        routing = routed.routing if rounded is None else rounded.routing
        if self._config.dispatch.capacity_factor is not None and ctx.training:
            routing, dropped_E = drop_beyond_capacity(routing, self._config, memo)
            rounded = Rounded(routing, torch.zeros_like(dropped_E), dropped_E)
        pending = self.dispatcher.dispatch(x_TD, routing, routed.bad_1, memo)
        self._refuse_bad(pending.bad_ranks)
        once(memo, "statistics", lambda: self._count(routed, rounded, ctx, read=pending.bad_ranks is not None))
        # While dispatch is pending: what does not need its rows.
        shared_TD = None if self.shared is None else self.shared(x_TD, ctx.num_tokens)
        weights, moe = self._store.materialise(self.layer_idx), self._config.moe

        def experts(rows: ExpertRows) -> Tensor:
            return run_experts(
                rows.x_RD, rows.row_N, rows.weight_N, rows.offset_e1, weights, moe.activation, moe.recompute_hidden
            )

        y_TD = pending.combine(experts)
        return y_TD if shared_TD is None else y_TD + shared_TD, routed.aux

    def _refuse_bad(self, bad_ranks: tuple[int, ...] | None) -> None:
        if bad_ranks:
            raise FloatingPointError(
                f"MoE layer {self.layer_idx}: router logits hold NaN or Inf on rank(s) {list(bad_ranks)}; lower the "
                "learning rate, or look at the layers before this one"
            )

    def _count(self, routed: RouterOutput, rounded: Rounded | None, ctx: MoEContext, *, read: bool) -> None:
        """Evaluation is not counted; neither is recomputation, since the caller asks once."""
        if ctx.training:
            self._balance.add(self.layer_idx, routed.count_E)
            if rounded is not None:
                self._balance.add_rounded(self.layer_idx, rounded.added_E, rounded.dropped_E)
            if not read:
                self._balance.add_bad(self.layer_idx, routed.bad_1)
