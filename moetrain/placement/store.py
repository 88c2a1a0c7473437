"""Expert parameters: masters with their owners, compute copies with their holders.

Shapes: D width, F expert hidden width, C owned chunks, H held chunks, L elements of a chunk, E experts held.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moetrain.config.errors import require
from moetrain.placement.chunks import ChunkLayout, ExpertShape
from moetrain.placement.current import CurrentPlacement
from moetrain.placement.held import BufferPool, Buffers, ExpertWeights, HeldExperts
from moetrain.placement.moving import move_rows
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives
from moetrain.placement.use import WeightUse

LARGEST_REQUEST = 1 << 22  # elements that ``initialise`` asks for at a time, to bound the memory that indices take


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

    placed: CurrentPlacement
    layout: ChunkLayout
    master: nn.Parameter  # [C, L]
    held: dict[str, HeldExperts] = field(default_factory=dict)  # by the hash of owners and holders, oldest first
    keeps: bool = True  # weights, from a forward pass to its backward pass and to the next micro-batch


class ExpertStore:
    """Owner-only masters, compute copies by sparse all-gather, gradients summed by sparse reduce-scatter.

    A micro-batch takes the experts of a layer under one placement (``use``); several placements may be in use at a
    time, and gradients of all of them add up on the owners. Gradients of compute weights never stay in ``.grad``: each
    backward's are added into a buffer of at least float32, so that micro-batches add up in that type.

    Args:
        shape: the matrices of one whole expert; where the placements have shards, a rank holds a shard of each matrix.
        placements: where the experts of each MoE layer are, by layer index; a ``CurrentPlacement`` may move.
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
        placements: Mapping[int, Placement | CurrentPlacement],
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
        self.reduces = False  # gradients of a layer start home as soon as a backward pass has left its experts
        require(
            torch.promote_types(master_dtype, self.grad_dtype) == master_dtype,
            f"ExpertStore: master_dtype must be at least {self.grad_dtype} with compute_dtype {compute_dtype}, "
            f"got {master_dtype}; use {self.grad_dtype}",
        )
        dtypes = (compute_dtype, self.grad_dtype, master_dtype)
        self.held_type = HeldExperts
        self._buffers = Buffers(*(BufferPool(dtype, self.device) for dtype in dtypes))
        self._layers = {layer: self._build(layer, placements[layer]) for layer in sorted(placements)}
        most = max((entry.placed.now.num_experts for entry in self._layers.values()), default=0)
        self._slot_E = torch.arange(most, dtype=torch.int32, device=self.device)
        self._under_way: list[WeightUse] = []  # forward passes whose backward pass is not over, in order

    def _build(self, layer: int, placed: Placement | CurrentPlacement) -> _Layer:
        pool = self.collectives
        placed = placed if isinstance(placed, CurrentPlacement) else CurrentPlacement(placed)
        placement = placed.now
        require(
            placement.num_ranks == pool.num_ranks and self.pool_rank == pool.group_rank,
            f"ExpertStore: layer {layer} is placed on {placement.num_ranks} ranks and this is pool rank "
            f"{self.pool_rank}, but the collectives join {pool.num_ranks} ranks and this is rank {pool.group_rank}; "
            "pass the expert pool's collectives",
        )
        layout = ChunkLayout(self.shape.shard(placement.num_shards), placement.num_slices)
        num_owned = pool.plan(placement).num_owned
        master = nn.Parameter(torch.zeros(num_owned, layout.slice_elems, dtype=self.master_dtype, device=self.device))
        return _Layer(placed, layout, master)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts, ascending."""
        return tuple(self._layers)

    def placement(self, layer: int) -> Placement:
        """Where the experts of ``layer`` are now."""
        return self._layer(layer).placed.now

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
        return self.shape.indices_of_shard(chunk.shard, self.placement(layer).num_shards, start, stop)

    def use(self, layer: int, placement: Placement | None = None, *, recomputes: bool = False) -> WeightUse:
        """The experts of ``layer`` for one micro-batch; all ranks of the pool ask for the same one.

        Args:
            layer: which layer.
            placement: under which it runs, forward, recomputed and backward; the current one if left out.
            recomputes: the layer is run again before its backward pass, with the same use (activation checkpointing).

        Raises:
            ValueError: the placement has other owners than the store.
        """
        entry = self._layer(layer)
        placement = placement or entry.placed.now
        held = self._held(layer, entry, placement)
        return WeightUse(self, layer, held, placement, repacks=not (entry.keeps or recomputes))

    def materialise(self, layer: int, placement: Placement | None = None) -> ExpertWeights:
        """The compute weights of the experts that this rank holds. A collective of the pool when the epoch is new.

        Within an epoch nothing is sent twice. Use them only there; gradients come to the owners by
        ``reduce_gradients``.

        Raises:
            ValueError: the placement has other owners than the store.
        """
        entry = self._layer(layer)
        placement = placement or entry.placed.now
        held = self._held(layer, entry, placement)
        held.owes_gradient |= torch.is_grad_enabled()
        held.start(entry.master, self.epoch)
        return WeightUse(self, layer, held, placement, repacks=False).weights()

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory that weights are gathered to, whose contents come and go by themselves."""
        return self._buffers.weights.owns(tensor)

    def keep_weights(self, layers: Iterable[int]) -> None:
        """Keep the weights of these layers from a forward pass to its backward pass; gather those of others again."""
        kept = set(layers)
        for layer, entry in self._layers.items():
            entry.keeps = layer in kept

    def start(self, layer: int, held: HeldExperts) -> None:
        """Gather the weights, unless they are here. A collective of the pool."""
        held.start(self._layer(layer).master, self.epoch)

    def forward_begun(self, use: WeightUse) -> None:
        """Gather, and count a use that will be differentiated."""
        if torch.is_grad_enabled() and not use.counted:
            use.counted = use.held.owes_gradient = True
            use.held.uses += 1
            self._under_way.append(use)
        self.start(use.layer, use.held)

    def forward_done(self, use: WeightUse) -> None:
        """Give weights back that are not kept."""
        if not self._layer(use.layer).keeps:
            use.held.release()

    def experts_differentiated(self, use: WeightUse) -> None:
        """Start gradients home, give weights back, and gather those of the layer before. Collectives of the pool."""
        entry = self._layer(use.layer)
        if self.reduces:
            use.held.start_reduce()
        if not entry.keeps:
            use.held.release()
        before = self._use_before(use)
        if before is not None:
            self.start(before.layer, before.held)

    def replan(self, use: WeightUse, placement: Placement) -> None:
        """Go on under ``placement`` in a use that has begun, before its experts have run. A collective of the pool.

        What this rank holds of it already stays; the rest is gathered now, and nothing hides that.
        """
        entry, before = self._layer(use.layer), use.held
        held = self._held(use.layer, entry, placement)
        use.move(held, placement)
        if held is before:
            return
        held.start_missing(entry.master, self.epoch, before)
        if use in self._under_way:
            before.uses -= 1
            before.owes_gradient &= before.uses > 0 or before.has_gradient
            held.uses += 1
            held.owes_gradient = True
        if before.uses == 0 and before.placement.seats_hash() != entry.placed.now.seats_hash():
            before.release()

    def finish(self, use: WeightUse) -> None:
        """Take the gradients in that are under way."""
        entry = self._layer(use.layer)
        if use.held.is_reducing:
            use.held.finish_reduce(entry.master)
        if use in self._under_way:
            self._under_way.remove(use)
            use.held.uses -= 1

    def _use_before(self, use: WeightUse) -> WeightUse | None:
        """The use that is differentiated next, if the passes go back the way they came."""
        at = self._under_way.index(use) if use in self._under_way else 0
        return self._under_way[at - 1] if at > 0 else None

    def _held(self, layer: int, entry: _Layer, placement: Placement) -> HeldExperts:
        key = placement.seats_hash()
        found = entry.held.get(key)
        if found is None:
            require(
                torch.equal(placement.owner_ES, entry.placed.now.owner_ES),
                f"ExpertStore: a placement of layer {layer} must have the owners that the store has now; plan again "
                "after owners have moved",
            )
            self._retire(entry)
            found = self.held_type(entry.layout, placement, self.collectives, self._buffers, self._slot_E)
            entry.held[key] = found
        return found

    def _retire(self, entry: _Layer) -> None:
        """Forget placements that nobody uses any more."""
        for key, held in list(entry.held.items()):
            if held.uses == 0 and not held.owes_gradient and not held.is_reducing:
                held.release()
                del entry.held[key]

    def reduce_gradients(self) -> None:
        """Sum what is left of all holders' gradients into the owners' ``.grad``, layers ascending. Of the whole pool.

        ``.grad`` of every owned parameter is then the sum of what came since ``zero_grad``, zeros where nothing came.
        """
        with torch.no_grad():
            for entry in self._layers.values():
                for held in entry.held.values():
                    if held.owes_gradient and not held.is_reducing:
                        held.start_reduce()
                    if held.is_reducing:
                        held.finish_reduce(entry.master)
                if entry.master.grad is None:
                    entry.master.grad = torch.zeros_like(entry.master)

    def owned_parameters(self) -> dict[int, nn.Parameter]:
        """The masters that this rank owns: layer -> [owned chunks, slice_elems], padding included and zero."""
        return {layer: entry.master for layer, entry in self._layers.items()}

    def owned_chunks(self, layer: int) -> tuple[OwnedChunk, ...]:
        """What each row of the owned parameter is."""
        entry = self._layer(layer)
        placement, layout = entry.placed.now, entry.layout
        return tuple(
            OwnedChunk(expert, placement.shard_of(self.pool_rank), row, *layout.slice_range(slice_idx))
            for row, (expert, slice_idx) in enumerate(placement.owned_by(self.pool_rank))
        )

    def advance_epoch(self) -> None:
        """Say that masters have changed (optimizer step, load): weights are gathered again where they are used next.

        What has not been reduced by now, or differentiated, is forgotten.
        """
        self.epoch += 1
        self._under_way.clear()
        for entry in self._layers.values():
            current = entry.placed.now.seats_hash()
            for key, held in list(entry.held.items()):
                held.uses = 0
                if key != current:
                    held.drop_gradient()
                    held.release()
                    del entry.held[key]

    def zero_grad(self) -> None:
        """Drop the owners' gradients, what has not been reduced yet, and uses that were never differentiated."""
        self._under_way.clear()
        for entry in self._layers.values():
            entry.master.grad = None
            for held in entry.held.values():
                held.uses = 0
                held.drop_gradient()

    @torch.no_grad()
    def move_owners(
        self, placements: Mapping[int, Placement], beside: Mapping[int, Sequence[Tensor]]
    ) -> dict[int, list[Tensor]]:
        """Give experts other owners, between steps: masters move, the parameters stay the same objects. Of the pool.

        Args:
            placements: of the layers that change, with their new owners; they become current.
            beside: for each of these layers, tensors like its owned parameter that move along (moments).

        Returns:
            For each of the layers those tensors as the new owner has them.

        Raises:
            RuntimeError: gradients are there that would be lost.
            ValueError: experts are cut into slices.
        """
        moved: dict[int, list[Tensor]] = {}
        for layer in sorted(placements):
            entry, after = self._layer(layer), placements[layer]
            if any(held.owes_gradient or held.is_reducing for held in entry.held.values()):
                raise RuntimeError(
                    f"ExpertStore.move_owners: layer {layer} has gradients on their way to its present owners; call "
                    "reduce_gradients or zero_grad first"
                )
            before = entry.placed.now
            tensors = [entry.master.detach(), *beside[layer]]
            master_CL, *moved[layer] = (move_rows(self.collectives, before, after, rows) for rows in tensors)
            for held in entry.held.values():
                held.release()
            entry.held.clear()
            entry.master.grad = None
            entry.master.data = master_CL
            entry.placed.set(after)
        return moved

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
        placement = entry.placed.now
        everywhere = self.collectives.plan(placement, everywhere=True)
        held_HL = owned_CL.new_empty(everywhere.num_held, owned_CL.shape[1])
        self.collectives.all_gather(everywhere, owned_CL, held_HL, purpose="inspect")
        num_experts, num_shards = placement.num_experts, placement.num_shards
        size = entry.layout.shape.num_parameters
        shard_EHN = held_HL.view(num_experts, num_shards, -1)[:, :, :size]
        whole_EN = owned_CL.new_empty(num_experts, self.shape.num_parameters)
        for shard in range(num_shards):
            index_N = self.shape.indices_of_shard(shard, num_shards, 0, size).to(whole_EN.device)
            whole_EN[:, index_N] = shard_EHN[:, shard]
        return {expert: whole_EN[expert].clone() for expert in range(num_experts)}

    def _layer(self, layer: int) -> _Layer:
        require(
            layer in self._layers,
            f"ExpertStore: layer {layer} has no experts here; layers with experts are {list(self._layers)}",
        )
        return self._layers[layer]
