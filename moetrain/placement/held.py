"""Compute copies of the experts that a rank holds under one placement, and the gradients that come back for them.

Shapes: H held chunks, L elements of a chunk, E experts held, D width, F expert hidden width (of a shard).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moetrain.placement.chunks import ChunkLayout
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives, SparsePlan, SparseWork


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


class BufferPool:
    """Flat memory that is lent and given back, so that steps allocate nothing. One type and device.

    It holds no more than was lent at one time.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._free: list[Tensor] = []
        self._made: list[StorageWeakRef] = []  # also what is lent at present

    @torch.inference_mode(False)  # the first to ask may be an evaluation, the second one trains
    def take(self, rows: int, length: int) -> Tensor:
        """[rows, length], unwritten: the smallest that fits; one that is too small is let go for a larger one."""
        size = rows * length
        fitting = [index for index, flat in enumerate(self._free) if flat.numel() >= size]
        if fitting:
            flat = self._free.pop(min(fitting, key=lambda index: self._free[index].numel()))
        else:
            if self._free:
                self._free.pop()
            flat = torch.empty(size, dtype=self._dtype, device=self._device)
            self._made = [one for one in self._made if not one.expired()] + [StorageWeakRef(flat.untyped_storage())]
        return flat[:size].view(rows, length)

    def give(self, tensor: Tensor) -> None:
        """Take back what ``take`` lent; nobody reads or writes it any more."""
        base = tensor._base if tensor._base is not None else tensor
        self._free.append(base)
        self._free.sort(key=Tensor.numel)

    def num_bytes(self) -> int:
        """What lies here at present."""
        return sum(flat.nbytes for flat in self._free)

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in memory of the pool, lent or not."""
        return any(one.cdata == tensor.untyped_storage()._cdata for one in self._made)


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """Memory of a store's layers, which they share: compute copies, their gradients, and owners' sums."""

    weights: BufferPool
    grads: BufferPool
    sums: BufferPool


def missing_seats(before: Placement, after: Placement) -> Placement:
    """The seats of ``after`` that ``before`` has not; where an expert lacks none, one that it has.

    To gather these is to come from one placement to the other; both have the same owners.
    """
    old_Z, new_Z = (one.expert_Z.long() * one.num_groups + one.holder_Z for one in (before, after))
    is_new_Z = ~torch.isin(new_Z, old_Z)
    has_new_E = torch.zeros(after.num_experts, dtype=torch.bool)
    has_new_E[after.expert_Z[is_new_Z].long()] = True
    # An owner that holds its expert has it by a copy on its own rank.
    owner_Z = after.owner_ES[:, 0][after.expert_Z.long()]
    stays_Z = is_new_Z | (~has_new_E[after.expert_Z.long()] & (after.holder_Z == owner_Z))
    count_E = torch.zeros(after.num_experts, dtype=torch.int32).index_add_(0, after.expert_Z.long(), stays_Z.int())
    offset_E1 = torch.cat((count_E.new_zeros(1), count_E.cumsum(0, dtype=torch.int32)))
    holder_Z = after.holder_Z[stays_Z]
    return Placement(
        after.num_groups, after.owner_ES, offset_E1, holder_Z, torch.ones_like(holder_Z), num_shards=after.num_shards
    )


class HeldExperts:
    """One layer's experts under one placement, on this rank: gathered, used, gathered again; gradients added up.

    Collectives are started by all ranks of the pool in the same order, by whoever calls this on all of them alike.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        placement: Placement,
        collectives: SparseCollectives,
        buffers: Buffers,
        slot_E: Tensor,
    ) -> None:
        """Nothing is gathered yet; ``slot_E`` counts the experts held."""
        self.placement = placement
        self.plan: SparsePlan = collectives.plan(placement)
        self.experts = placement.experts_of(self.plan.rank)
        self.uses = 0  # forward passes whose backward pass is not over
        self.owes_gradient = False  # some use was differentiable, and nothing has been reduced since
        self._layout = layout
        self._collectives = collectives
        self._buffers = buffers
        self._slot_E = slot_E
        self._epoch = -1
        self._held_HL: Tensor | None = None
        self._gathering: SparseWork | None = None
        self._grad_HL: Tensor | None = None
        self._sum_CL: Tensor | None = None
        self._reducing: SparseWork | None = None

    def start(self, master_CL: Tensor, epoch: int) -> None:
        """Start to gather the masters of ``epoch``, unless they are here or under way. A collective of the pool."""
        if self._held_HL is not None and self._epoch == epoch:
            return
        if self._held_HL is None:
            self._held_HL = self._buffers.weights.take(self.plan.num_held, self._layout.slice_elems)
        self._gathering = self._collectives.start_all_gather(self.plan, master_CL.detach(), self._held_HL)
        self._epoch = epoch

    def start_missing(self, master_CL: Tensor, epoch: int, other: "HeldExperts") -> None:
        """Gather what this rank does not hold under another placement, of which it has the weights of ``epoch``.

        A collective of the pool. Owners hold what they own under both.
        """
        if self._held_HL is not None and self._epoch == epoch:
            return
        self.release()
        missing, length = missing_seats(other.placement, self.placement), self._layout.slice_elems
        plan = self._collectives.plan(missing)
        part_HL = self._buffers.weights.take(plan.num_held, length)
        gathering = self._collectives.start_all_gather(plan, master_CL.detach(), part_HL)
        self._held_HL = self._buffers.weights.take(self.plan.num_held, length)
        have_EL, part_EL, mine_EL = (
            rows.view(len(experts), self._layout.expert_elems)
            for rows, experts in (
                (other.gathered(), other.experts),
                (part_HL, missing.experts_of(plan.rank)),
                (self._held_HL, self.experts),
            )
        )
        gathering.wait()
        sources = {expert: part_EL[row] for row, expert in enumerate(missing.experts_of(plan.rank))}
        sources |= {expert: have_EL[row] for row, expert in enumerate(other.experts)}
        for row, expert in enumerate(self.experts):
            mine_EL[row].copy_(sources[expert])
        self._buffers.weights.give(part_HL)
        self._epoch = epoch

    def gathered(self) -> Tensor:
        """[H, L], after waiting for it."""
        assert self._held_HL is not None
        self.wait()
        return self._held_HL

    @property
    def is_here(self) -> bool:
        """Whether weights are gathered or under way."""
        return self._held_HL is not None

    def weights(self) -> ExpertWeights:
        """Views of what was gathered, after waiting for it. They share memory that ``release`` takes away."""
        assert self._held_HL is not None, "weights are used before they are gathered"
        self.wait()
        w_in, w_out = self._matrices(self._held_HL)
        return ExpertWeights(w_in, w_out, self._slot_E[: len(self.experts)], self.experts)

    def wait(self) -> None:
        """Wait for weights that are under way."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def release(self) -> None:
        """Give the memory of the weights back."""
        if self._held_HL is not None:
            self.wait()
            self._buffers.weights.give(self._held_HL)
            self._held_HL, self._epoch = None, -1

    @torch.no_grad()
    def add_gradient(self, dw_in: Tensor | None, dw_out: Tensor | None) -> None:
        """Add gradients of the weights; None for what has none."""
        fresh = self._grad_HL is None
        grad_HL = self._grad_HL = self._empty_gradient() if self._grad_HL is None else self._grad_HL
        if fresh:  # padding travels too
            grad_HL.view(len(self.experts), self._layout.expert_elems)[:, self._layout.shape.num_parameters :].zero_()
        for total, part in zip(self._matrices(grad_HL), (dw_in, dw_out), strict=True):
            if part is None and fresh:
                total.zero_()
            elif part is not None:
                total.copy_(part) if fresh else total.add_(part)

    def start_reduce(self) -> None:
        """Start to sum all holders' gradients on the owners. A collective of the pool, also where nothing came."""
        length = self._layout.slice_elems
        if self._grad_HL is None:
            self._grad_HL = self._empty_gradient().zero_()
        self.owes_gradient = False
        self._sum_CL = self._buffers.sums.take(self.plan.num_owned, length)
        self._reducing = self._collectives.start_reduce_scatter(self.plan, self._grad_HL, self._sum_CL)

    @property
    def has_gradient(self) -> bool:
        """Whether gradients have been added that were not reduced."""
        return self._grad_HL is not None

    @property
    def is_reducing(self) -> bool:
        """Whether gradients are under way to their owners."""
        return self._reducing is not None

    @torch.no_grad()
    def finish_reduce(self, master: torch.nn.Parameter) -> None:
        """Wait for what ``start_reduce`` started, and add it to the masters' ``.grad``."""
        assert self._reducing is not None
        assert self._sum_CL is not None
        self._reducing.wait()
        if master.grad is None:
            master.grad = self._sum_CL.clone()
        else:
            master.grad.add_(self._sum_CL)
        self._buffers.sums.give(self._sum_CL)
        self._sum_CL = self._reducing = None
        if self._grad_HL is not None:
            self._buffers.grads.give(self._grad_HL)
            self._grad_HL = None

    def drop_gradient(self) -> None:
        """Forget gradients that were not reduced, or are on their way."""
        self.owes_gradient = False
        if self._reducing is not None:
            self._reducing.wait()
            assert self._sum_CL is not None
            self._buffers.sums.give(self._sum_CL)
            self._sum_CL = self._reducing = None
        if self._grad_HL is not None:
            self._buffers.grads.give(self._grad_HL)
            self._grad_HL = None

    def _empty_gradient(self) -> Tensor:
        return self._buffers.grads.take(self.plan.num_held, self._layout.slice_elems)

    def _matrices(self, chunks_HL: Tensor) -> tuple[Tensor, Tensor]:
        per_expert = chunks_HL.view(len(self.experts), self._layout.expert_elems)
        return self._layout.shape.split(per_expert)
