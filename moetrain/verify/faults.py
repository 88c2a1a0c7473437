"""Faults put into a parallel run from outside, to prove that `moetrain verify` would notice them.

Shapes: H held chunks, L elements of a chunk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.models.attention import Attention
from moetrain.models.transformer import ModelOutput
from moetrain.moe.context import RoutingMemo
from moetrain.moe.dispatch.contract import Dispatcher, PendingCombine, PendingDispatch, PendingPiece
from moetrain.moe.dispatch.seats import DispatchSeats, SeatTables, SeatTiles
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers.contract import Router, RouterOutput
from moetrain.moe.routing import Routing
from moetrain.moe.rules.rounding import Rounding
from moetrain.ops import attend
from moetrain.placement.held import HeldExperts
from moetrain.placement.placement import Placement
from moetrain.sequence import PackedBatch, Piece, SequencePlan
from moetrain.sequence import ring as ring_module
from moetrain.sequence.ring import Arriving, Ring
from moetrain.train.engine import Engine
from moetrain.train.feed import StepFeed
from moetrain.train.optimizer import moments
from moetrain.train.placing import Plan
from moetrain.train.schedule import Lane, RoundByRound

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


class _WithoutLargest(HeldExperts):
    """drop-holder: of each sum over holders, the largest gradient of an expert of the pool is lost."""

    def start_reduce(self) -> None:
        """As it was, less one holder's gradient of one expert; a collective of the pool."""
        grad_HL = self._grad_HL = self._empty_gradient().zero_() if self._grad_HL is None else self._grad_HL
        norms = [float(one.norm()) for one in grad_HL.view(max(1, len(self.experts)), -1)] if self.experts else [0.0]
        mine = torch.tensor(max(norms), dtype=torch.float64)
        largest = mine.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if self.experts and mine == largest:
            grad_HL.view(len(self.experts), -1)[norms.index(max(norms))] = 0
        super().start_reduce()


class _Averaged(HeldExperts):
    """average: gradients of experts are averaged over holders."""

    def start_reduce(self) -> None:
        """As it was, but every holder sends its part of the mean."""
        if self._grad_HL is not None:
            for row, expert in enumerate(self.experts):
                self._grad_HL.view(len(self.experts), -1)[row] /= len(self.placement.holders_of(expert))
        super().start_reduce()


class _WithoutLastSeat(DispatchSeats):
    """drop-seat: the pairs of the last seat that has some are lost."""

    def refine(self, routing: Routing, memo: RoutingMemo | None, tiles: SeatTiles | None = None) -> Routing:
        """As it was, less the pairs of one seat."""
        refined = super().refine(routing, memo, tiles)
        offset_E1 = refined.offset_E1
        last_E1 = offset_E1 == offset_E1[-1]  # where nothing comes after
        shorter_E1 = torch.where(last_E1, offset_E1[~last_E1].max() if bool((~last_E1).any()) else 0, offset_E1)
        return replace(refined, offset_E1=shorter_E1.int())


class _TablesWithoutLastSeat:
    def __init__(self, tables: SeatTables) -> None:
        self._tables = tables

    def of(self, placement: Placement) -> DispatchSeats:
        """Of this placement, with a hole."""
        seats = self._tables.of(placement)
        return _WithoutLastSeat(seats.placement, seats.to, seats.choice)


class _Deaf(TensorParallel):
    """skip-tp-gather: attention of all ranks but the first sees zeros in place of the first rank's tokens."""

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


def create_groups(mesh: FoldedMesh, mutate: str | None, timeout: timedelta, *, gangs: bool) -> MeshGroups:
    """This rank's process groups, the wrong ones where a mutation says so. Collective."""
    kind = AloneGroups if mutate == "wrong-group" else MeshGroups
    return kind.create(mesh, device_type="cpu", timeout=timeout, gangs=gangs)


def inject(name: str | None, engine: Engine) -> None:
    """Put the fault ``name`` into an engine that has been built; see ``mutations``."""
    if name is not None:
        FAULTS[name](engine)


def _in_its_groups(engine: Engine) -> None:
    """wrong-group: ``create_groups`` has done it."""
    assert isinstance(engine.groups, AloneGroups)


def _drop_holder(engine: Engine) -> None:
    engine.store.held_type = _WithoutLargest


def _average(engine: Engine) -> None:
    engine.store.held_type = _Averaged


def _drop_seat(engine: Engine) -> None:
    for layer in _parts(engine, MoELayer) if engine.groups.rank == 0 else []:
        layer.dispatcher._tables = _TablesWithoutLastSeat(layer.dispatcher._tables)  # type: ignore[attr-defined]


def _swap_owners(engine: Engine) -> None:
    """Masters of a rank that owns several experts of a layer change places in each move; a lone one is turned round."""
    move = engine.move_owners

    def spoil(placements: Mapping[int, Placement]) -> None:
        move(placements)
        for layer in placements:
            owned = engine.store.owned_parameters()[layer]
            owned.data = owned.detach().flip(0 if len(owned) > 1 else 1)

    engine.move_owners = spoil  # type: ignore[method-assign]


def _lose_moment(engine: Engine) -> None:
    move = engine.move_owners

    def spoil(placements: Mapping[int, Placement]) -> None:
        move(placements)
        for shard in engine.experts:
            if shard.expert_layer in placements:
                moments(engine.optimizer, shard)["exp_avg"].zero_()

    engine.move_owners = spoil  # type: ignore[method-assign]


def _stale_plan(engine: Engine) -> None:
    """The first rank answers with the plan of before, which all ranks find out before any uses its own."""
    placing = engine.placing
    planned = placing.planned
    seen: list[Plan | None] = [None]

    def stale() -> Plan | None:
        plan = planned()
        if plan is not None:
            seen.append(plan)
        return plan if plan is None else seen[-2] or plan

    if engine.groups.rank == 0:
        placing.planned = stale  # type: ignore[method-assign]


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


class _Lossy:
    """drop-ring-step: what comes is lost."""

    def __init__(self, ring: Ring) -> None:
        self.rank, self.size, self._ring = ring.rank, ring.size, ring

    def exchange(self, send: Tensor, receive: Tensor) -> Arriving:
        return _Lost(self._ring.exchange(send, receive), receive)


@dataclass(frozen=True, slots=True, eq=False)
class _Lost:
    arriving: Arriving
    receive: Tensor

    def wait(self) -> None:
        self.arriving.wait()
        self.receive.zero_()


def _drop_ring_step(engine: Engine) -> None:
    """All that the first rank hears; the others pass on what there is."""
    ring_of = engine.lane.ring_of
    if engine.lane.rank == 0:
        _put_lane(engine, replace(engine.lane, ring_of=lambda gang: _Lossy(ring_of(gang))))


def _put_lane(engine: Engine, lane: Lane) -> None:
    assert isinstance(engine.schedule, RoundByRound)
    engine.lane = engine.schedule.lane = lane


def _local_lse(engine: Engine) -> None:
    """What earlier steps of a ring have weighed is forgotten in the log-sum-exp, not in the output."""

    def forgets(*args: Any, out: Tensor | None, lse: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        return attend(*args, out=out, lse=lse, **options)[0], attend(*args, **options)[1]

    for attention in _parts(engine, Attention):
        whole = attention._attend_heads

        def spoil(*args: Any, whole: Callable[..., Tensor] = whole) -> Tensor:
            with patch.object(ring_module, "attend", forgets):
                return whole(*args)

        attention._attend_heads = spoil  # type: ignore[assignment,method-assign]


def _change_pieces(engine: Engine, change: Callable[[tuple[Piece, ...]], tuple[Piece, ...]]) -> None:
    """Batches of gangs say something else of where their tokens are from."""

    def spoil(module: nn.Module, args: tuple[PackedBatch]) -> tuple[PackedBatch]:
        (batch,) = args
        return (batch if batch.gang is None else replace(batch, pieces=change(batch.pieces)),)

    engine.model.register_forward_pre_hook(spoil)


def _local_positions(engine: Engine) -> None:
    def from_zero(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        found, places = [], dict.fromkeys((piece.sequence for piece in pieces), 0)
        for piece in pieces:
            start = places[piece.sequence]
            places[piece.sequence] += piece.stop - piece.start
            found.append(Piece(piece.sequence, start, places[piece.sequence], 0))
        return tuple(found)

    _change_pieces(engine, from_zero)


def _swap_parts(engine: Engine) -> None:
    def swapped(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        first, *rest = pieces if pieces else (None,)
        if first is None or not rest or rest[0].sequence != first.sequence:
            return pieces
        late = rest[0]
        size = late.stop - late.start
        begin = late.stop - (first.stop - first.start)
        return (_moved(first, begin, late.stop), _moved(late, first.start, first.start + size), *rest[1:])

    _change_pieces(engine, swapped)


def _moved(piece: Piece, start: int, stop: int) -> Piece:
    """The same piece, from another place of its sequence."""
    return piece._replace(start=start, stop=stop)


def _scale_by_rank(engine: Engine) -> None:
    """The loss is right; its gradient weighs each rank's micro-batch alike."""

    def scale(module: nn.Module, args: tuple[PackedBatch], options: dict[str, Any], output: ModelOutput) -> ModelOutput:
        factor = options["num_step_tokens"] / (engine.groups.size("data") * max(1, args[0].num_tokens))
        return output._replace(ce_sum=output.ce_sum + (factor - 1) * (output.ce_sum - output.ce_sum.detach()))

    engine.model.register_forward_hook(scale, with_kwargs=True)


def _stale_offload(engine: Engine) -> None:
    """What comes back is taken as it is, whether it is back or not."""
    assert engine.offload is not None
    engine.offload.wait_for = lambda copying: None  # type: ignore[method-assign]


class _OtherPlan(StepFeed):
    """plan-differs: the last rank finds another plan in its memory."""

    def digest_of(self, plan: SequencePlan) -> bytes:
        """Of this rank's plan, one bit being turned on the last rank."""
        digest = super().digest_of(plan)
        is_last = dist.get_rank() == dist.get_world_size() - 1
        return digest if not is_last else bytes([digest[0] ^ 1]) + digest[1:]


def feed_type(mutate: str | None) -> type[StepFeed]:
    """What gives ranks their plans, the wrong one where a mutation says so."""
    return _OtherPlan if mutate == "plan-differs" else StepFeed


def _in_its_feed(engine: Engine) -> None:
    """plan-differs: ``feed_type`` does it."""


FAULTS: MappingProxyType[str, Callable[[Engine], None]] = MappingProxyType(
    {
        "drop-holder": _drop_holder,
        "average": _average,
        "drop-seat": _drop_seat,
        "swap-owners": _swap_owners,
        "lose-moment": _lose_moment,
        "stale-plan": _stale_plan,
        "wrong-group": _in_its_groups,
        "scale-weight": _scale_weight,
        "round-alone": _round_alone,
        "skip-tp-sum": _skip_tp_sum,
        "skip-tp-gather": _skip_tp_gather,
        "drop-etp-shard": _drop_etp_shard,
        "local-lse": _local_lse,
        "drop-ring-step": _drop_ring_step,
        "local-positions": _local_positions,
        "swap-parts": _swap_parts,
        "scale-by-rank": _scale_by_rank,
        "plan-differs": _in_its_feed,
        "stale-offload": _stale_offload,
    }
)


def _parts(engine: Engine, kind: type[M]) -> list[M]:
    """The modules of one kind."""
    return [module for module in engine.model.modules() if isinstance(module, kind)]


def _scale_weights(module: nn.Module, args: object, output: RouterOutput) -> RouterOutput:
    routing = output.routing
    return replace(output, routing=replace(routing, weight_N=routing.weight_N * SCALE))
