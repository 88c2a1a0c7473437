"""What the tests of dispatch share: one layer's worth of experts over ranks against all in one place.

Small whole numbers, so that no order of sums can matter. Every rank makes all ranks' tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe.helpers import (
    WIDTH,
    choices_of,
    expert_weights,
    integer_routing,
    make_layer,
    make_moe,
    make_params,
    rank_routing,
)
from placement.placements import random_placement, server_of
from torch import Tensor

from moetrain.config import MoELayerConfig
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe import (
    BalanceState,
    ExpertRows,
    LocalDispatcher,
    MoELayer,
    Padding,
    PendingDispatch,
    Routing,
    make_dispatcher,
    run_experts,
)
from moetrain.moe.dispatch import groups as groups_module
from moetrain.moe.dispatch import plan as plan_module
from moetrain.moe.dispatch.destinations import Destinations
from moetrain.moe.dispatch.plan import DispatchPlan
from moetrain.ops import plan_rows as plan_ops
from moetrain.placement.held import ExpertWeights
from moetrain.placement.placement import Placement
from moetrain.placement.static import plan_static


def slice_of(rank: int, sizes: list[int]) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def in_one_place(params: dict[str, Tensor], x_TD: Tensor, routing: Routing) -> tuple[ExpertWeights, Tensor]:
    """All experts' weights, and what they make of all tokens."""
    everything = expert_weights(params)
    pending = LocalDispatcher(routing.num_experts).dispatch(x_TD, routing, torch.zeros(1, dtype=torch.int32))
    return everything, pending.combine(experts(everything))


def experts(weights: ExpertWeights) -> Callable[[ExpertRows], Tensor]:
    def run(rows: ExpertRows) -> Tensor:
        return run_experts(rows.x_RD, rows.row_N, rows.weight_N, rows.offset_e1, weights, "relu2")

    return run


def plan_of(pending: PendingDispatch) -> DispatchPlan:
    """The plan of a micro-batch in one piece."""
    (piece,) = pending.pieces
    return piece.plan  # type: ignore[attr-defined]


def destinations_of(ranks: list[int], held: list[list[int]], group_rank: int, device: Any = "cpu") -> Destinations:
    """From the rank of each expert, and the experts of each rank of the group."""
    local = [held[rank].index(expert) for expert, rank in enumerate(ranks)]
    rank_E, local_E = (torch.tensor(one, dtype=torch.int32, device=device) for one in (ranks, local))
    return Destinations(rank_E, local_E, max(map(len, held)), len(held[group_rank]), len(held))


def scattered_placement(num_experts: int, seed: int) -> Placement:
    """Each expert on a random rank: ranks without experts and experts out of order are ordinary."""
    world = dist.get_world_size()
    ranks = torch.randint(world, (num_experts,), generator=torch.Generator().manual_seed(seed)).tolist()
    alone = [(rank,) for rank in ranks]
    return Placement.of(world, alone, alone)


def by_expert(weights: ExpertWeights, name: str) -> Tensor:
    return getattr(weights, name).grad[weights.slot_E.long()]


COMPOSED = SimpleNamespace(plan_sends=plan_ops._composed_sends, plan_receives=plan_ops._composed_receives)
EXACT = ("y", "dx", "dweight", "dw_in", "dw_out")


@dataclass(frozen=True)
class Mode:
    """How rows are sent: ranks of a node for two levels, pieces, and whether messages are padded.

    ``composed``: plans are made of torch's operators, as accelerators make them.
    """

    per_node: int = 0
    pieces: int = 1
    padded: bool = False
    composed: bool = False


@dataclass(frozen=True)
class Setting:
    """What is routed: tokens of each rank, and where experts are: spread evenly, scattered, or with replicas."""

    sizes: tuple[int, ...]
    num_experts: int
    top_k: int
    seed: int = 7
    scattered: bool = False
    replicated: bool = False

    def placement(self, groups: MeshGroups) -> Placement:
        if self.replicated:
            world = dist.get_world_size()
            return random_placement(self.seed, world, self.num_experts, 1, idle=self.seed % world)
        if self.scattered:
            return scattered_placement(self.num_experts, self.seed)
        return plan_static(groups.mesh, self.num_experts)

    def routing(self) -> Routing:
        """Of all tokens."""
        return integer_routing(sum(self.sizes), self.num_experts, self.top_k, self.seed)


def over_holders(weights: ExpertWeights, held: tuple[int, ...], setting: Setting, name: str) -> Tensor:
    """All experts' gradients, summed over the ranks that hold them."""
    mine = by_expert(weights, name)
    total = mine.new_zeros(setting.num_experts, *mine.shape[1:])
    total[list(held)] = mine
    dist.all_reduce(total)
    return total


def make_groups(mode: Mode, parts: int = 1) -> MeshGroups:
    world = dist.get_world_size()
    two_level = mode.per_node > 0
    return MeshGroups.create(
        FoldedMesh(dp_shard=world, ep=world // parts, etp=parts, ranks_per_node=mode.per_node or 8, two_level=two_level)
    )


def padding_of(setting: Setting) -> Padding:
    """Bounds that hold on all ranks, with room to spare."""
    whole = setting.routing()
    parts = [rank_routing(whole, slice_of(rank, list(setting.sizes))) for rank in range(len(setting.sizes))]
    return Padding(max(setting.sizes) + 1, max(int(part.offset_E1.diff().max()) for part in parts) + 1)


def body(rank: int, setting: Setting, mode: Mode, spoil: str = "") -> dict[str, Any]:
    """What this rank finds, its traffic, and how often it exchanged counts or stopped for the host."""
    sizes = list(setting.sizes)
    params = make_params(make_moe(num_experts=setting.num_experts, top_k=setting.top_k, activation="relu2"))
    params = {name: value.detach().float().round() for name, value in params.items()}
    rng = torch.Generator().manual_seed(setting.seed)
    x_TD = torch.randint(-2, 3, (sum(sizes), WIDTH), generator=rng).float()
    pull_TD = torch.randint(-2, 3, (sum(sizes), WIDTH), generator=rng).float()
    whole, here = setting.routing(), slice_of(rank, sizes)
    padding = padding_of(setting) if mode.padded else None
    groups, counter = make_groups(mode), TrafficCounter(ranks_per_node=mode.per_node or 2)
    calls = {"counts": 0, "copies": 0}
    try:
        placement = setting.placement(groups)
        held = placement.experts_of(rank)
        weights = expert_weights(params, held)
        dispatcher = make_dispatcher(placement, groups, counter, pieces=mode.pieces, padding=padding)
        mine = rank_routing(whole, here)
        limited = replace(mine, limit=padding.limit) if padding else mine
        if rank == 0:
            limited = _spoiled(limited, spoil)
        x_mine_TD = x_TD[here].clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if mode.composed:
                patch.setattr(plan_ops, "OPS", COMPOSED)
            _count_calls(patch, groups_module, "exchange_counts", calls, "counts")
            _count_calls(patch, plan_module.HostNumbers, "__init__", calls, "copies")
            pending = dispatcher.dispatch(x_mine_TD, limited, torch.zeros(1, dtype=torch.int32))
            y_TD = pending.combine(experts(weights))
            y_TD.backward(pull_TD[here])

        everything, whole_TD = in_one_place(params, x_TD.requires_grad_(), whole)
        whole_TD.backward(pull_TD)
        assert whole.weight_N.grad is not None
        dweight = rank_routing(replace(whole, weight_N=whole.weight_N.grad), here).weight_N.detach()
        assert mine.weight_N.grad is not None
        assert x_mine_TD.grad is not None
        assert x_TD.grad is not None
        return {
            "y": torch.equal(y_TD, whole_TD[here]),
            "dx": torch.equal(x_mine_TD.grad, x_TD.grad[here]),
            "dweight": torch.equal(mine.weight_N.grad, dweight),
            "dw_in": torch.equal(over_holders(weights, held, setting, "w_in"), by_expert(everything, "w_in")),
            "dw_out": torch.equal(over_holders(weights, held, setting, "w_out"), by_expert(everything, "w_out")),
            "destinations": [sorted({server_of(placement, rank, e) for e in ids}) for ids in choices_of(mine)],
            "rows": counter.rows,
            "bytes": counter.bytes,
            "between": counter.between_nodes,
            "most experts": placement.most_held(),
            "bad": pending.bad_ranks,
            **calls,
        }
    finally:
        groups.close()


def _count_calls(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: dict[str, int], key: str) -> None:
    original = getattr(owner, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls[key] += 1
        return original(*args, **options)

    patch.setattr(owner, name, counted)


def _spoiled(routing: Routing, spoil: str) -> Routing:
    if spoil == "scaled weight":
        return replace(routing, weight_N=torch.cat((routing.weight_N[:1] + 1, routing.weight_N[1:])))
    if spoil == "dropped pair":
        return replace(routing, offset_E1=routing.offset_E1.clamp(max=len(routing.token_N) - 1))
    return routing


def assert_exact(found: dict[str, Any]) -> None:
    assert all(found[name] for name in EXACT), found


def spread_layer(
    groups: MeshGroups, config: MoELayerConfig, **options: Any
) -> tuple[MoELayer, ExpertWeights, BalanceState]:
    """A layer with the experts of this rank; ``options`` are the dispatcher's."""
    placement = plan_static(groups.mesh, config.moe.num_experts)
    return make_layer(
        config,
        make_params(config),
        dispatcher=make_dispatcher(placement, groups, **options),
        experts=placement.experts_of(groups.pool_rank),
    )
