"""Sparse all-gather and reduce-scatter of expert chunks (Hecate, arXiv 2502.02581, definitions of section 4).

Shapes: C owned chunks, H held chunks (experts held x slices), L elements of a chunk. Chunks ascend by (expert,
slice) everywhere: in tensors, and in the one message that each pair of ranks exchanges.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config.errors import require
from moetrain.mesh.traffic import TrafficCounter
from moetrain.ops.chunks import add_sources, chunk_table
from moetrain.placement.placement import Placement


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """What one rank sends and receives in the all-gather; the reduce-scatter is the same plan reversed.

    Attributes:
        rank: the pool rank that the plan is for.
        num_owned: C, chunks that this rank owns.
        num_held: H, chunks of the experts that this rank holds.
        sends: for each destination, ascending, the owned chunks (row numbers) that it holds. Its own rank may be
            among the destinations: those chunks are copied.
        receives: for each source, ascending, the held chunks (row numbers) that it owns; own rank likewise.
    """

    rank: int
    num_owned: int
    num_held: int
    sends: tuple[tuple[int, tuple[int, ...]], ...]
    receives: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, placement: Placement, rank: int, *, everywhere: bool = False) -> "SparsePlan":
        """The plan of ``rank`` under ``placement``; every rank derives its own and they fit together.

        With ``everywhere``, every rank gets every slice of every expert, whoever holds it.
        """
        shards = placement.num_shards
        group, own_shard = divmod(rank, shards)
        sends: dict[int, list[int]] = {}
        receives: dict[int, list[int]] = {}
        num_owned = num_held = 0
        for expert, owners in enumerate(placement.owner_ES.tolist()):
            holders = placement.holders_of(expert)
            targets = range(placement.num_ranks) if everywhere else [held * shards + own_shard for held in holders]
            for owner in owners:
                if owner == group:
                    for target in targets:
                        sends.setdefault(target, []).append(num_owned)
                    num_owned += 1
            for shard in range(shards) if everywhere else [own_shard] * (group in holders):
                for owner in owners:
                    receives.setdefault(owner * shards + shard, []).append(num_held)
                    num_held += 1
        return cls(rank, num_owned, num_held, _ascending(sends), _ascending(receives))


class SparseCollectives:
    """The two sparse collectives over one process group that nothing else should use.

    Args:
        group: the expert pool's process group; ``None`` for a pool of one rank.
        group_rank: this rank's position in it.
        counter: where chunks and bytes sent to other ranks are counted.
    """

    def __init__(self, group: ProcessGroup | None, group_rank: int, counter: TrafficCounter | None = None) -> None:
        size = 1 if group is None else group.size()
        require(
            0 <= group_rank < size,
            f"SparseCollectives: group_rank must be between 0 and {size - 1}, got {group_rank}; "
            "pass this rank's position in the group",
        )
        self.group = group
        self.group_rank = group_rank
        self.num_ranks = size
        self.counter = counter
        self._sums: dict[tuple[SparsePlan, int, torch.device], Tensor] = {}  # tables on their device, made once

    def all_gather(self, plan: SparsePlan, owned_CL: Tensor, held_HL: Tensor, *, purpose: str = "gather") -> None:
        """Fill ``held_HL`` with the chunks of every expert that this rank holds. A collective of the whole group.

        Args:
            plan: this rank's plan.
            owned_CL: the chunks that this rank owns, of the type to be sent.
            held_HL: where the chunks go; every row is written.
            purpose: what the traffic is counted as.

        Raises:
            ValueError: a tensor or the plan does not fit.
        """
        self._check("all_gather", plan, owned_CL, held_HL)
        outgoing = {rank: owned_CL[_index(rows, owned_CL)].contiguous() for rank, rows in plan.sends}
        incoming = {rank: held_HL.new_empty(len(rows), held_HL.shape[1]) for rank, rows in plan.receives}
        received = self._exchange(outgoing, incoming, purpose)
        for rank, rows in plan.receives:
            held_HL[_index(rows, held_HL)] = received[rank]

    def reduce_scatter(self, plan: SparsePlan, held_HL: Tensor, owned_CL: Tensor, *, purpose: str = "scatter") -> None:
        """Fill ``owned_CL`` with the sum of all holders' chunks. A collective of the whole group.

        Contributions are sent in the type of ``held_HL`` and are added in ascending order of the holder's rank, so
        that equal inputs give equal bits. Chunks that no rank contributes to cannot occur: an expert has a holder.

        Args:
            plan: this rank's plan, the all-gather's.
            held_HL: this rank's contributions, at least float32.
            owned_CL: where the sums go, contiguous and of the same type; every row is written.
            purpose: what the traffic is counted as.

        Raises:
            ValueError: a tensor or the plan does not fit, or the type is narrower than float32.
        """
        self._check("reduce_scatter", plan, owned_CL, held_HL)
        require(
            torch.promote_types(held_HL.dtype, torch.float32) == held_HL.dtype,
            f"SparseCollectives.reduce_scatter: gradients must be summed in at least float32, got {held_HL.dtype}; "
            "convert them first",
        )
        length = held_HL.shape[1]
        peers = [(rank, len(rows)) for rank, rows in plan.sends if rank != self.group_rank]
        received_RL = held_HL.new_empty(sum(count for _, count in peers), length)
        blocks = received_RL.split([count for _, count in peers])
        incoming = {rank: block for (rank, _), block in zip(peers, blocks, strict=True)}
        outgoing = {
            rank: held_HL[_index(rows, held_HL)].contiguous() for rank, rows in plan.receives if rank != self.group_rank
        }
        self._exchange(outgoing, incoming, purpose)
        key = (plan, length, held_HL.device)
        if key not in self._sums:
            self._sums[key] = _table_of_sums(plan, length, held_HL.device)
        add_sources(owned_CL, (held_HL.contiguous(), received_RL), self._sums[key])

    def _exchange(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor], purpose: str) -> dict[int, Tensor]:
        """One message per pair of ranks, sends and receives by ascending peer; what stays here is passed through."""
        operations = []
        for peer in range(self.num_ranks):
            if peer == self.group_rank:
                continue
            if peer in outgoing:
                message = outgoing[peer]
                operations.append(dist.P2POp(dist.isend, message, group=self.group, group_peer=peer))
                self._count(purpose, peer, message)
            if peer in incoming:
                operations.append(dist.P2POp(dist.irecv, incoming[peer], group=self.group, group_peer=peer))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        if self.group_rank in incoming:
            incoming[self.group_rank] = outgoing[self.group_rank]
        return incoming

    def _count(self, purpose: str, peer: int, message: Tensor) -> None:
        if self.counter is not None and self.group is not None:
            counts = [0] * self.num_ranks
            counts[peer] = message.shape[0]
            self.counter.add_rows(purpose, message.shape[1] * message.element_size(), counts, self.group)

    def _check(self, name: str, plan: SparsePlan, owned_CL: Tensor, held_HL: Tensor) -> None:
        require(
            plan.rank == self.group_rank,
            f"SparseCollectives.{name}: the plan is for rank {plan.rank} but this is rank {self.group_rank}; "
            "derive it with SparsePlan.of",
        )
        peers = [rank for rank, _ in (*plan.sends, *plan.receives)]
        require(
            max(peers, default=0) < self.num_ranks,
            f"SparseCollectives.{name}: the plan names rank {max(peers, default=0)} but the group has "
            f"{self.num_ranks} ranks; plan for this group",
        )
        for what, tensor, rows in (("owned", owned_CL, plan.num_owned), ("held", held_HL, plan.num_held)):
            require(
                tensor.dim() == 2 and tensor.shape[0] == rows,
                f"SparseCollectives.{name}: {what} chunks must be [{rows}, L], got {list(tensor.shape)}",
            )
        require(
            owned_CL.shape[1] == held_HL.shape[1] and owned_CL.dtype == held_HL.dtype,
            f"SparseCollectives.{name}: owned and held chunks must have one length and type, got "
            f"{owned_CL.shape[1]} of {owned_CL.dtype} and {held_HL.shape[1]} of {held_HL.dtype}",
        )


def _ascending(rows_of: dict[int, list[int]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    return tuple((rank, tuple(rows_of[rank])) for rank in sorted(rows_of))


def _table_of_sums(plan: SparsePlan, length: int, device: torch.device) -> Tensor:
    """For each owned chunk its holders' contributions, ascending: own ones from source 0, received ones from 1."""
    terms: list[list[tuple[int, int]]] = [[] for _ in range(plan.num_owned)]
    own = (row for rank, rows in plan.receives if rank == plan.rank for row in rows)
    num_received = 0
    for rank, rows in plan.sends:
        for chunk in rows:
            if rank == plan.rank:
                terms[chunk].append((0, next(own)))
            else:
                terms[chunk].append((1, num_received))
                num_received += 1
    rows_of_table = (
        (source, row * length, chunk * length, length)
        for chunk, contributions in enumerate(terms)
        for source, row in contributions
    )
    return chunk_table(rows_of_table, 4, device)


def _index(rows: tuple[int, ...], like: Tensor) -> slice | Tensor:
    """Ascending ``rows`` as an index: a slice where they are evenly spaced (no copy, no transfer), else a tensor.

    Static placements are always evenly spaced; an index tensor costs a copy to the device.
    """
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if rows == tuple(range(rows[0], rows[-1] + 1, step)):
        return slice(rows[0], rows[-1] + 1, step)
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
