"""Faults put into a parallel run from outside, to prove that `moetrain verify` would notice them.

Shapes: H held chunks, C owned chunks, L elements of a chunk.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import MappingProxyType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.models.attention import Attention
from moetrain.moe.context import RoutingMemo
from moetrain.moe.dispatch.contract import Dispatcher, PendingCombine, PendingDispatch, PendingPiece
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers.contract import Router, RouterOutput
from moetrain.moe.routing import Routing
from moetrain.moe.rules.rounding import Rounding
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives, SparsePlan, SparseWork
from moetrain.train.engine import Engine

SCALE = 1.001
M = TypeVar("M", bound=nn.Module)


class AloneGroups(MeshGroups):
    """wrong-group: dense gradients are reduced over a group in which each rank is alone."""

    def dense_mesh(self) -> DeviceMesh:
        """A mesh of this rank only. Collective."""
        for rank in range(dist.get_world_size()):
            group = dist.new_group([rank])
            if rank == self.rank:
                mine = group
                self._created.append(group)
        return DeviceMesh.from_group(mine, "cpu", mesh_dim_names=("dp_shard",))


class FaultyCollectives(SparseCollectives):
    """drop-holder and average: expert gradients are reduced wrongly; all else is the original's work."""

    def __init__(self, engine: Engine, *, drops: bool = False, averages: bool = False) -> None:
        """For an engine whose layers have one placement."""
        original = engine.store.collectives
        super().__init__(original.group, original.group_rank, original.counter, ranks_per_node=original.ranks_per_node)
        self._drops, self._averages = drops, averages
        self._placement = engine.store.placement(engine.store.layers[0])
        self._pool = engine.groups.group("pool")

    def start_reduce_scatter(
        self, plan: SparsePlan, held_HL: Tensor, owned_CL: Tensor, *, purpose: str = "scatter"
    ) -> SparseWork:
        """The sum over holders, less one of them, or divided by their number. It has ended when this returns."""
        if self._drops:
            held_HL = self._without_largest(held_HL)
        work = super().start_reduce_scatter(plan, held_HL, owned_CL, purpose=purpose)
        work.wait()
        if self._averages:
            owned = self._placement.owned_by(plan.rank)
            for row, (expert, _) in enumerate(owned):
                owned_CL[row] /= len(self._placement.holders_of(expert))
        return work

    def _without_largest(self, held_HL: Tensor) -> Tensor:
        """Drop one expert's gradient on one holder: the largest of the pool, so that something is lost."""
        experts = self._placement.experts_of(self.group_rank)
        norms = [float(chunks.norm()) for chunks in held_HL.view(max(1, len(experts)), -1)] if experts else [0.0]
        mine = torch.tensor(max(norms), dtype=torch.float64)
        largest = mine.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._pool)
        kept_HL = held_HL.clone()
        if experts and mine == largest:
            kept_HL.view(len(experts), -1)[norms.index(max(norms))] = 0
        return kept_HL


class _Deaf(TensorParallel):
    """skip-tp-gather: attention of all ranks but the first sees zeros in place of the first rank's tokens.."""

    def gather(self, x_tD: Tensor, num_tokens: int) -> Tensor:
        """The gathered tokens, less those of the group's first rank where this is another one."""
        x_TD = super().gather(x_tD, num_tokens)
        if self.rank == 0:
            return x_TD
        kept_T1 = torch.arange(num_tokens)[:, None] >= x_tD.shape[0]
        return x_TD * kept_T1


class _WithoutLastShard:
    """drop-etp-shard: what the last etp shard of each expert adds to a row is lost."""

    def __init__(self, dispatcher: Dispatcher, groups: MeshGroups) -> None:
        self._dispatcher = dispatcher
        self._is_last = groups.group_rank("etp") == groups.size("etp") - 1

    def placement(self) -> Placement | None:
        """The dispatcher's."""
        return self._dispatcher.placement()

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        bad_1: Tensor,
        memo: RoutingMemo | None = None,
        placement: Placement | None = None,
    ) -> PendingDispatch:
        """As it was, except that the last shard's results are zero."""
        pending = self._dispatcher.dispatch(x_TD, routing, bad_1, memo, placement)
        return replace(pending, pieces=tuple(map(_Silenced, pending.pieces))) if self._is_last else pending


class _Silenced:
    def __init__(self, piece: PendingPiece) -> None:
        self.wait = piece.wait
        self._piece = piece

    def combine(self, y_RD: Tensor) -> PendingCombine:
        return self._piece.combine(y_RD * 0)


def create_groups(mesh: FoldedMesh, mutate: str | None, timeout: timedelta) -> MeshGroups:
    """This rank's process groups, the wrong ones where a mutation says so. Collective."""
    kind = AloneGroups if mutate == "wrong-group" else MeshGroups
    return kind.create(mesh, device_type="cpu", timeout=timeout)


def inject(name: str | None, engine: Engine) -> None:
    """Put the fault ``name`` into an engine that has been built; see ``mutations``."""
    if name is not None:
        FAULTS[name](engine)


def _in_its_groups(engine: Engine) -> None:
    """wrong-group: ``create_groups`` has done it."""
    assert isinstance(engine.groups, AloneGroups)


def _drop_holder(engine: Engine) -> None:
    engine.store.collectives = FaultyCollectives(engine, drops=True)


def _average(engine: Engine) -> None:
    engine.store.collectives = FaultyCollectives(engine, averages=True)


def _scale_weight(engine: Engine) -> None:
    for router in _parts(engine, Router) if engine.groups.rank == 0 else []:
        router.register_forward_hook(_scale_weights)


def _round_alone(engine: Engine) -> None:
    rule = engine.run.dispatch.rounding
    assert rule != "none"
    for layer in _parts(engine, MoELayer):
        layer.rules = (Rounding(rule, engine.run.layer_config),)


def _skip_tp_sum(engine: Engine) -> None:
    engine.share_gradients = lambda: None  # type: ignore[method-assign]


def _skip_tp_gather(engine: Engine) -> None:
    for attention in _parts(engine, Attention):
        attention.tp = _Deaf(attention.tp.group, attention.tp.rank, attention.tp.counter)


def _drop_etp_shard(engine: Engine) -> None:
    for layer in _parts(engine, MoELayer):
        layer.dispatcher = _WithoutLastShard(layer.dispatcher, engine.groups)


FAULTS: MappingProxyType[str, Callable[[Engine], None]] = MappingProxyType(
    {
        "drop-holder": _drop_holder,
        "average": _average,
        "wrong-group": _in_its_groups,
        "scale-weight": _scale_weight,
        "round-alone": _round_alone,
        "skip-tp-sum": _skip_tp_sum,
        "skip-tp-gather": _skip_tp_gather,
        "drop-etp-shard": _drop_etp_shard,
    }
)


def _parts(engine: Engine, kind: type[M]) -> list[M]:
    """The modules of one kind."""
    return [module for module in engine.model.modules() if isinstance(module, kind)]


def _scale_weights(module: nn.Module, args: object, output: RouterOutput) -> RouterOutput:
    routing = output.routing
    return replace(output, routing=replace(routing, weight_N=routing.weight_N * SCALE))
