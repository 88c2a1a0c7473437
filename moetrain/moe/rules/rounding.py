"""Token rounding of a layer's routing: every holder of an expert receives whole tiles of rows (arXiv 2512.14080).

Its domain is a micro-batch over a dispatch group: what the ranks of the group send to one holder of an expert is
rounded together, after the placement has said who sends to whom; where placements move, all that the group has for an
expert. Which domain a token is in changes the result, so the
one-process oracle applies the rule per domain. The residual of ``balance`` runs over the experts of one call and is
not kept, so a resumed run goes on as if it had never stopped. It stays within half a tile only where no cell lacks
fillers: a cell that nearly all tokens chose must go down, and the total with it. Training only: evaluation uses the
exact top-k.

The router's counts, and with them the balance loss and selection biases, are of its choices before rounding.
Shapes: T tokens, E experts, N pairs before and P after (capacities), W ranks of the dispatch group.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from moetrain.config import MoELayerConfig, RouterConfig
from moetrain.config.errors import require
from moetrain.config.moe import RoundRule
from moetrain.mesh.collectives import all_gather_stack
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.context import MoEContext, RoutingMemo, once
from moetrain.moe.routing import Routing
from moetrain.moe.rules.contract import RuleOutcome
from moetrain.ops import RoundedPairs, gather_rows, key_of, offer_pairs, round_pairs
from moetrain.placement.placement import Placement


def rounding_score(logits_TE: Tensor, router: RouterConfig) -> Tensor:
    """What tokens are ranked by, and what fillers weigh before ``weight_scale``; it carries gradient to the logits.

    The softmax over all experts. For sigmoid routers s, or s / (sum of all s) where weights are renormalised: an
    expert then never weighs more as a filler than it would have weighed if chosen.
    """
    if router.score != "sigmoid":
        return logits_TE.softmax(dim=-1)
    # Shares as a softmax of logarithms: scores may all be too small for their type.
    return functional.logsigmoid(logits_TE).softmax(dim=-1) if router.renormalise else logits_TE.sigmoid()


class Rounding:
    """Rounds the routing of any layer whose experts are placed alike."""

    def __init__(
        self,
        rule: RoundRule,
        config: MoELayerConfig,
        *,
        group: ProcessGroup | None = None,
        group_rank: int = 0,
        holder_WE: Tensor | None = None,
        counter: TrafficCounter | None = None,
    ) -> None:
        """Fix the domain.

        Args:
            rule: see ``moetrain.ops.round_pairs``.
            config: of the experts.
            group: the dispatch group; None where experts are local.
            group_rank: this rank's index in it.
            holder_WE: int32, the holder to which rank w of the group sends expert e's tokens.
            counter: counts the offers that leave this rank, as "offers".
        """
        self._rule: RoundRule = rule
        self._tile = config.dispatch.tile
        self._router = config.router
        self._group = group
        self._group_rank = group_rank
        self._holder_WE = holder_WE
        self._counter = counter

    def apply(
        self, routing: Routing, logits_TE: Tensor, ctx: MoEContext, layer_idx: int, memo: RoutingMemo | None = None
    ) -> RuleOutcome:
        """Round one micro-batch; see ``RoutingRule``. Collective over the group, for any T.

        Chosen pairs keep the weights that the router gave them, renormalised among all it chose; what is dropped is
        not made up for. Fillers weigh their raw score (``rounding_score``). Both carry gradient.
        """
        score_TE = rounding_score(logits_TE, self._router)
        pairs = once(memo, "rounding", lambda: self._decide(routing, score_TE, ctx, layer_idx))
        weight_X = torch.cat((routing.weight_N, (score_TE * self._router.weight_scale).flatten()))
        weight_P = gather_rows(weight_X.unsqueeze(1), pairs.source_P, pairs.offset_E1).squeeze(1)
        rounded = Routing(pairs.token_P, weight_P, pairs.offset_E1, routing.token_gid_T2, routing.num_tokens)
        return RuleOutcome(rounded, pairs.added_E, pairs.dropped_E)

    @torch.no_grad()
    def _decide(self, routing: Routing, score_TE: Tensor, ctx: MoEContext, layer_idx: int) -> RoundedPairs:
        pairs = (score_TE, routing.token_N, routing.offset_E1)
        offers = offer_pairs(*pairs, routing.token_gid_T2, self._tile, valid_T=ctx.valid_T)
        offers_WEX = None
        if self._group is not None:
            offers_WEX = all_gather_stack(offers.offers_EX, self._group, counter=self._counter)
        key = key_of(ctx.random_key, "rounding", layer_idx)
        return round_pairs(
            *pairs,
            offers,
            self._tile,
            self._rule,
            key=key,
            offers_WEX=offers_WEX,
            holder_WE=self._holder_WE,
            rank=self._group_rank,
        )


def make_rounding(
    config: MoELayerConfig,
    placement: Placement | None,
    groups: MeshGroups,
    counter: TrafficCounter | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Rounding | None:
    """The rounding of ``dispatch.rounding`` over the group that the dispatcher sends rows in; None for "none".

    Where the placement moves (None), an expert's rows are rounded together, whoever holds it: no plan changes the loss.
    The dispatcher then gives its holders whole tiles.

    Routings to round are on ``device``.
    """
    if config.dispatch.rounding == "none":
        return None
    if groups.size("ep") == 1:
        return Rounding(config.dispatch.rounding, config)
    holder_WE = torch.zeros(groups.size("ep"), config.moe.num_experts, dtype=torch.int32)
    if placement is not None:
        sources = [groups.mesh.pool_rank(rank) // placement.num_shards for rank in groups.ranks("ep")]
        holder_WE = torch.stack([_only_holders(placement, source) for source in sources])
    return Rounding(
        config.dispatch.rounding,
        config,
        group=groups.group("ep"),
        group_rank=groups.group_rank("ep"),
        holder_WE=holder_WE.to(device, torch.int32),
        counter=counter,
    )


def _only_holders(placement: Placement, source: int) -> Tensor:
    """The group that gets all tokens of ``source`` for each expert.

    Raises:
        ValueError: several holders of an expert have a share: what each gets is not known before seats are assigned.
    """
    (open_Z,) = placement.shares(source).nonzero(as_tuple=True)
    require(
        len(open_Z) == placement.num_experts,
        f"rounding: with a placement that never moves, all tokens of a source for an expert must go to one holder, but "
        f"those of group {source} are split; round per expert where placements move",
    )
    return placement.holder_Z[open_Z]
