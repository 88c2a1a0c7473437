"""Faults put into a parallel run from outside, to prove that `moetrain verify` would notice them.

Shapes: H held chunks, C owned chunks, L elements of a chunk.
"""

from dataclasses import replace
from datetime import timedelta

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
from moetrain.moe.routers.token_choice import Router, RouterOutput
from moetrain.moe.routing import Routing
from moetrain.moe.rules.rounding import Rounding
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives, SparsePlan
from moetrain.train.engine import Engine
from moetrain.verify.spec import Mutation

SCALE = 1.001


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

    def __init__(self, original: SparseCollectives, mutation: Mutation, placement: Placement, groups: MeshGroups):
        """``placement`` is that of every layer."""
        super().__init__(original.group, original.group_rank, original.counter)
        self._mutation = mutation
        self._placement = placement
        self._pool = groups.group("pool")

    def reduce_scatter(self, plan: SparsePlan, held_HL: Tensor, owned_CL: Tensor, *, purpose: str = "scatter") -> None:
        """The sum over holders, less one of them, or divided by their number."""
        if self._mutation == "drop-holder":
            held_HL = self._without_largest(held_HL)
        super().reduce_scatter(plan, held_HL, owned_CL, purpose=purpose)
        if self._mutation == "average":
            owned = self._placement.owned_by(plan.rank)
            for row, (expert, _) in enumerate(owned):
                owned_CL[row] /= len(self._placement.holders[expert])

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
    """drop-part: what the last etp shard of each expert adds to a row is lost."""

    def __init__(self, dispatcher: Dispatcher, groups: MeshGroups) -> None:
        self._dispatcher = dispatcher
        self._is_last = groups.group_rank("etp") == groups.size("etp") - 1

    def dispatch(
        self, x_TD: Tensor, routing: Routing, bad_1: Tensor, memo: RoutingMemo | None = None
    ) -> PendingDispatch:
        """As it was, except that the last shard's results are zero."""
        pending = self._dispatcher.dispatch(x_TD, routing, bad_1, memo)
        return replace(pending, pieces=tuple(map(_Silenced, pending.pieces))) if self._is_last else pending


class _Silenced:
    def __init__(self, piece: PendingPiece) -> None:
        self.wait = piece.wait
        self._piece = piece

    def combine(self, y_RD: Tensor) -> PendingCombine:
        return self._piece.combine(y_RD * 0)


def create_groups(mesh: FoldedMesh, mutation: Mutation | None, timeout: timedelta) -> MeshGroups:
    """This rank's process groups, the wrong ones where the mutation says so. Collective."""
    kind = AloneGroups if mutation == "wrong-group" else MeshGroups
    return kind.create(mesh, device_type="cpu", timeout=timeout)


def inject(mutation: Mutation | None, engine: Engine) -> None:
    """Put the fault into an engine that has been built. wrong-group was in its groups already."""
    if mutation in ("drop-holder", "average"):
        placement = engine.store.placement(engine.store.layers[0])
        engine.store.collectives = FaultyCollectives(engine.store.collectives, mutation, placement, engine.groups)
    if mutation == "scale-weight" and engine.groups.rank == 0:
        for module in engine.model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(_scale_weights)
    if mutation == "skip-tp-sum":
        engine.share_gradients = lambda: None  # type: ignore[method-assign]
    if mutation == "skip-tp-gather":
        for module in engine.model.modules():
            if isinstance(module, Attention):
                module.tp = _Deaf(module.tp.group, module.tp.rank, module.tp.counter)
    if mutation == "drop-part":
        for module in engine.model.modules():
            if isinstance(module, MoELayer):
                module.dispatcher = _WithoutLastShard(module.dispatcher, engine.groups)
    if mutation == "round-alone" and engine.run.dispatch.rounding != "none":
        for module in engine.model.modules():
            if isinstance(module, MoELayer):
                module.rounding = Rounding(engine.run.dispatch.rounding, engine.run.layer_config)


def _scale_weights(module: nn.Module, args: object, output: RouterOutput) -> RouterOutput:
    routing = output.routing
    return replace(output, routing=replace(routing, weight_N=routing.weight_N * SCALE))
