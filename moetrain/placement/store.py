"""Expert parameters: masters with their owners, compute copies with their holders.

Shapes: D width, F expert hidden width, C owned chunks, H held chunks, L elements of a chunk, E experts held.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moetrain.config.errors import NotBuiltYetError, require
from moetrain.placement.chunks import ChunkLayout, ExpertShape
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives, SparsePlan

LARGEST_REQUEST = 1 << 22  # elements that ``initialise`` asks for at a time, to bound the memory that indices take


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The experts of one layer that this rank computes with.

    Attributes:
        w_in: [slots, 2 or 1, F, D], strided over slots; F is that of a shard.
        w_out: [slots, D, F], strided over slots.
        slot_E: int32, the slot of each expert held.
        experts: global ids of the experts held, ascending.
    """

    w_in: Tensor
    w_out: Tensor
    slot_E: Tensor
    experts: tuple[int, ...]


class OwnedChunk(NamedTuple):
    """Row ``row`` of an owned parameter: elements [start, stop) of the logical vector of ``shard`` of ``expert``.

    They are the first ``stop - start`` of the row; the rest is padding.
    """

    expert: int
    shard: int
    row: int
    start: int
    stop: int


@dataclass(slots=True)
class _Layer:
    """Everything the store keeps for one layer."""

    placement: Placement
    layout: ChunkLayout
    plan: SparsePlan
    master: nn.Parameter  # [C, L]
    held_HL: Tensor  # compute copies; empty until materialised
    grad_HL: Tensor  # at least float32; empty until materialised
    weights: ExpertWeights | None = None
    filled_epoch: int = -1


class ExpertStore:
    """Owner-only masters, compute copies by sparse all-gather, gradients summed by sparse reduce-scatter.

    Gradients of the compute weights never stay in ``.grad``: a hook adds each backward's into a buffer of at least
    float32, so that micro-batches add up in that type.

    Args:
        shape: the matrices of one whole expert; where the placements have shards, a rank holds a shard of each matrix.
        placements: the placement of each MoE layer, by layer index.
        collectives: over the expert pool; ``None`` for a pool of one rank.
        pool_rank: this rank's position in the pool.
        compute_dtype: of ``materialise``'s weights.
        master_dtype: of the owned parameters; at least float32 and at least as wide as ``compute_dtype``.
        device: where everything lives.

    Raises:
        ValueError: placements, pool and types do not fit together.
    """

    def __init__(
        self,
        shape: ExpertShape,
        placements: Mapping[int, Placement],
        collectives: SparseCollectives | None,
        pool_rank: int,
        *,
        compute_dtype: torch.dtype,
        master_dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.shape = shape
        self.collectives = collectives or SparseCollectives(None, 0)
        self.pool_rank = pool_rank
        self.compute_dtype = compute_dtype
        self.master_dtype = master_dtype
        self.grad_dtype = torch.promote_types(compute_dtype, torch.float32)
        self.device = torch.device(device)
        self.epoch = 0
        require(
            torch.promote_types(master_dtype, self.grad_dtype) == master_dtype,
            f"ExpertStore: master_dtype must be at least {self.grad_dtype} with compute_dtype {compute_dtype}, "
            f"got {master_dtype}; use {self.grad_dtype}",
        )
        plans: dict[int, SparsePlan] = {}
        self._layers = {layer: self._build(layer, placements[layer], plans) for layer in sorted(placements)}

    def _build(self, layer: int, placement: Placement, plans: dict[int, SparsePlan]) -> _Layer:
        """``plans`` has, by identity, what placements were planned for earlier layers, which often share one."""
        pool = self.collectives
        require(
            placement.num_ranks == pool.num_ranks and self.pool_rank == pool.group_rank,
            f"ExpertStore: layer {layer} is placed on {placement.num_ranks} ranks and this is pool rank "
            f"{self.pool_rank}, but the collectives join {pool.num_ranks} ranks and this is rank {pool.group_rank}; "
            "pass the expert pool's collectives",
        )
        layout = ChunkLayout(self.shape.shard(placement.num_shards), placement.num_slices)
        if id(placement) not in plans:
            plans[id(placement)] = SparsePlan.of(placement, self.pool_rank)
        plan = plans[id(placement)]
        length = layout.slice_elems
        master = nn.Parameter(torch.zeros(plan.num_owned, length, dtype=self.master_dtype, device=self.device))
        held_HL = torch.empty(0, length, dtype=self.compute_dtype, device=self.device)
        grad_HL = torch.empty(0, length, dtype=self.grad_dtype, device=self.device)
        return _Layer(placement, layout, plan, master, held_HL, grad_HL)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts, ascending."""
        return tuple(self._layers)

    def placement(self, layer: int) -> Placement:
        """Where the experts of ``layer`` live."""
        return self._layer(layer).placement

    def layout(self, layer: int) -> ChunkLayout:
        """How the experts of ``layer`` are cut."""
        return self._layer(layer).layout

    def initialise(self, values: Callable[[int, int, Tensor], Tensor]) -> None:
        """Fill the owned masters; every rank fills its own, nothing is sent.

        Args:
            values: ``values(layer, expert, index_N)`` gives those elements (int64) of the expert's logical vector, as
                a flat tensor. Asked for at most ``LARGEST_REQUEST`` at a time.

        Raises:
            ValueError: a tensor of another length came back.
        """
        with torch.no_grad():
            for layer in self.layers:
                master = self._layers[layer].master
                master.zero_()
                for chunk in self.owned_chunks(layer):
                    for start in range(chunk.start, chunk.stop, LARGEST_REQUEST):
                        index_N = self.indices(layer, chunk, start, min(chunk.stop, start + LARGEST_REQUEST))
                        flat = values(layer, chunk.expert, index_N)
                        require(
                            flat.shape == index_N.shape,
                            f"ExpertStore.initialise: layer {layer}, expert {chunk.expert} needs {len(index_N)} values "
                            f"from {start} on, got a tensor of shape {list(flat.shape)}",
                        )
                        place = start - chunk.start
                        master[chunk.row, place : place + len(index_N)] = flat.to(master)
        self.advance_epoch()

    def indices(self, layer: int, chunk: OwnedChunk, start: int, stop: int) -> Tensor:
        """int64: where elements [start, stop) of the chunk's shard lie in the whole expert's logical vector."""
        return self.shape.indices_of_shard(chunk.shard, self._layer(layer).placement.num_shards, start, stop)

    def materialise(self, layer: int, placement: Placement | None = None) -> ExpertWeights:
        """The compute weights of the experts that this rank holds. A collective of the pool when the epoch is new.

        The returned leaves are refilled in place when the epoch has moved, so they stay the same objects; use them
        only within one epoch. Within an epoch nothing is sent twice.

        Raises:
            NotBuiltYetError: ``placement`` is not the one that the store was made with.
        """
        entry = self._layer(layer)
        if placement is not None and not placement.same_as(entry.placement):
            raise NotBuiltYetError(
                "placement", "one that moves between steps", "materialise with the store's own placement"
            )
        if entry.weights is None:
            self._allocate(entry)
        if entry.filled_epoch != self.epoch:
            with torch.no_grad():
                owned_CL = entry.master.detach().to(self.compute_dtype)
                self.collectives.all_gather(entry.plan, owned_CL, entry.held_HL)
            entry.filled_epoch = self.epoch
        assert entry.weights is not None
        return entry.weights

    def reduce_gradients(self) -> None:
        """Sum all holders' gradients into the owners' ``.grad``, layers ascending. A collective of the pool.

        ``.grad`` of every owned parameter is set (not added to), to zeros where no gradient came; the holders'
        buffers start again from zero.
        """
        with torch.no_grad():
            for entry in self._layers.values():
                grad_HL = entry.grad_HL
                if entry.weights is None:
                    grad_HL = grad_HL.new_zeros(entry.plan.num_held, grad_HL.shape[1])
                total_CL = torch.empty_like(entry.master, dtype=self.grad_dtype)
                self.collectives.reduce_scatter(entry.plan, grad_HL, total_CL)
                entry.master.grad = total_CL.to(self.master_dtype)
                entry.grad_HL.zero_()

    def owned_parameters(self) -> dict[int, nn.Parameter]:
        """The masters that this rank owns: layer -> [owned chunks, slice_elems], padding included and zero."""
        return {layer: entry.master for layer, entry in self._layers.items()}

    def owned_chunks(self, layer: int) -> tuple[OwnedChunk, ...]:
        """What each row of the owned parameter is."""
        entry = self._layer(layer)
        placement, layout = entry.placement, entry.layout
        return tuple(
            OwnedChunk(expert, placement.shard_of(self.pool_rank), row, *layout.slice_range(slice_idx))
            for row, (expert, slice_idx) in enumerate(placement.owned_by(self.pool_rank))
        )

    def advance_epoch(self) -> None:
        """Say that masters have changed (optimizer step, load): the next ``materialise`` gathers again."""
        self.epoch += 1

    def zero_grad(self) -> None:
        """Drop the owners' gradients and what has not been reduced yet."""
        for entry in self._layers.values():
            entry.master.grad = None
            entry.grad_HL.zero_()

    def full_expert(
        self, layer: int, tensor_of: Literal["master"] | Mapping[int, Tensor] = "master"
    ) -> dict[int, Tensor]:
        """Every expert's logical vector, on every rank. A collective of the pool, for checks and small models.

        Args:
            layer: which layer.
            tensor_of: the masters, or by layer a tensor shaped like the owned parameter (gradients, moments).

        Returns:
            Expert id -> vector of ``shape.num_parameters`` elements, in the tensor's own type.

        Raises:
            ValueError: the tensor does not have the owned parameter's shape.
        """
        entry = self._layer(layer)
        owned_CL = (entry.master if tensor_of == "master" else tensor_of[layer]).detach()
        require(
            owned_CL.shape == entry.master.shape,
            f"ExpertStore.full_expert: layer {layer} needs a tensor like the owned parameter, "
            f"{list(entry.master.shape)}, got {list(owned_CL.shape)}",
        )
        everywhere = SparsePlan.of(entry.placement, self.pool_rank, everywhere=True)
        held_HL = owned_CL.new_empty(everywhere.num_held, owned_CL.shape[1])
        self.collectives.all_gather(everywhere, owned_CL, held_HL, purpose="inspect")
        num_experts, num_shards = entry.placement.num_experts, entry.placement.num_shards
        size = entry.layout.shape.num_parameters
        shard_EHN = held_HL.view(num_experts, num_shards, -1)[:, :, :size]
        whole_EN = owned_CL.new_empty(num_experts, self.shape.num_parameters)
        for shard in range(num_shards):
            index_N = self.shape.indices_of_shard(shard, num_shards, 0, size).to(whole_EN.device)
            whole_EN[:, index_N] = shard_EHN[:, shard]
        return {expert: whole_EN[expert].clone() for expert in range(num_experts)}

    @torch.inference_mode(False)  # the first caller may be an evaluation, the second one trains
    def _allocate(self, entry: _Layer) -> None:
        length, num_held = entry.layout.slice_elems, entry.plan.num_held
        entry.held_HL = entry.held_HL.new_empty(num_held, length)
        entry.grad_HL = entry.grad_HL.new_zeros(num_held, length)
        experts = entry.placement.experts_of(self.pool_rank)
        expert_elems = entry.layout.expert_elems
        leaves = entry.layout.shape.split(entry.held_HL.view(len(experts), expert_elems))
        grads = entry.layout.shape.split(entry.grad_HL.view(len(experts), expert_elems))
        w_in, w_out = (_accumulating_leaf(leaf, grad) for leaf, grad in zip(leaves, grads, strict=True))
        slot_E = torch.arange(len(experts), dtype=torch.int32, device=self.device)
        entry.weights = ExpertWeights(w_in, w_out, slot_E, experts)

    def _layer(self, layer: int) -> _Layer:
        require(
            layer in self._layers,
            f"ExpertStore: layer {layer} has no experts here; layers with experts are {list(self._layers)}",
        )
        return self._layers[layer]


def _accumulating_leaf(values: Tensor, grad: Tensor) -> Tensor:
    """A leaf over ``values`` whose gradients are added into ``grad`` as they come."""
    leaf = values.detach().requires_grad_()

    def add(tensor: Tensor) -> None:
        assert tensor.grad is not None
        grad.add_(tensor.grad)
        tensor.grad = None

    leaf.register_post_accumulate_grad_hook(add)
    return leaf
