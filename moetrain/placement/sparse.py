"""Sparse all-gather and reduce-scatter of expert chunks (Hecate, arXiv 2502.02581, definitions of section 4).

Shapes: C owned chunks, H held chunks (experts held x slices), L elements of a chunk, W ranks of the pool. Chunks ascend
by (expert, slice) everywhere: in tensors, and in the one message that each pair of ranks exchanges in a hop.

**Direct**: an owner sends its chunk to every holder, and every holder its gradient to the owner. **Two-level**, where
``ranks_per_node`` is given: an owner sends its chunk to the holders on its own node and to one leader on every other
node that has holders; the leader passes it on. Gradients come back the same way: a leader adds up its node and sends
one sum. Either way |holders and owner| - 1 chunks move; in two levels only |nodes of holders and owner| - 1 of them
between nodes. Leaders differ from expert to expert, so that no rank's network card serves a whole node.

Sums run over the holders in ascending order of their ranks; in two levels over those of each node, then over the nodes.
Who owns and who leads changes no bit. Direct and two-level sums agree in bits for whole numbers alone.

What overlaps: on gloo a first hop moves while the caller computes; what follows it (a second hop, unpacking, sums) is
done in ``wait``, in ``progress``, or when the collective after next is started. On NCCL both hops and all copies and
sums are queued at the start, on a stream of their own, each hop as one group of sends and receives, and ``wait`` makes
the caller's stream wait. What of this has run where: docs/gpu-status.md.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.mesh.traffic import TrafficCounter
from moetrain.ops.native import CLASSES
from moetrain.placement.placement import Placement

Collective = Literal["all_gather", "reduce_scatter"]


@dataclass(frozen=True, slots=True, eq=False)
class SparsePlan:
    """What one rank sends and receives under a placement, derived natively in some ten microseconds.

    Attributes:
        native: torch.classes.moetrain.SparsePlan.
        rank: the pool rank that the plan is for.
        num_owned: C, chunks that this rank owns.
        num_held: H, chunks of the experts that this rank holds.
    """

    native: Any
    rank: int
    num_owned: int
    num_held: int

    @classmethod
    def of(
        cls, placement: Placement, rank: int, *, ranks_per_node: int | None = None, everywhere: bool = False
    ) -> "SparsePlan":
        """The plan of ``rank`` under ``placement``; every rank derives its own and they fit together.

        Args:
            placement: of one layer.
            rank: of the pool.
            ranks_per_node: consecutive pool ranks that are one node, for two levels; None: direct.
            everywhere: every rank gets every slice of every shard of every expert, whoever holds it.

        Raises:
            ValueError: ``rank`` or ``ranks_per_node`` is out of range.
        """
        nodes_of = placement.num_ranks if ranks_per_node is None else ranks_per_node
        return cls.wrap(CLASSES.SparsePlan(*_arrays(placement), rank, nodes_of, everywhere))

    @classmethod
    def wrap(cls, native: Any) -> "SparsePlan":
        """The typed face of a native plan."""
        return cls(native, native.rank(), native.num_owned(), native.num_held())

    def sent_chunks(self, collective: Collective) -> list[int]:
        """Chunks that this rank sends to each of the W ranks, both hops together."""
        counts: list[int] = self.native.sent_chunks(collective)
        return counts

    def messages(self, collective: Collective, hop: int, *, sends: bool) -> dict[int, list[int]]:
        """The chunks of each message of a hop (0 or 1), by the peer that it goes to or comes from, for checks.

        Chunks are numbered by (expert, shard, slice) over the whole layer.
        """
        messages: dict[int, list[int]] = {}
        for peer, chunk in self.native.edges(collective, hop, sends).tolist():
            messages.setdefault(peer, []).append(chunk)
        return messages

    def num_staged(self, collective: Collective, *, converts: bool = False) -> tuple[int, int]:
        """Chunks of staging memory: of messages that lie nowhere in one piece, and of sums (or converted chunks).

        Args:
            collective: which.
            converts: whether owned chunks have another type than held ones.
        """
        messages, work = self.native.num_staged(collective, converts)
        return messages, work


@dataclass(frozen=True, slots=True, eq=False)
class SparseWork:
    """A collective in flight. Its tensors stay untouched by the caller, and are kept, until it was waited for.

    Attributes:
        native: the collectives that started it.
        ticket: its number among them.
    """

    native: Any
    ticket: int

    def wait(self) -> None:
        """Finish this collective, and those that were started before it.

        On a CPU the results are there afterwards; elsewhere, for whatever the current stream does next. Where several
        are in flight, all ranks wait for them in one order, and for nothing else in between that needs a rank which has
        not come as far.

        Raises:
            RuntimeError: a peer has gone, or the group's timeout has passed; says who waited for what from whom. The
                collectives are of no more use.
        """
        self.native.wait(self.ticket)

    def progress(self) -> None:
        """Send what follows from the first hop, after waiting for that; nothing where this rank leads nobody.

        Called between computations it lets a second hop move beside them on gloo. Never needed.
        """
        self.native.progress(self.ticket)


class SparseCollectives:
    """The two sparse collectives over one process group that nothing else should use.

    Every rank of the group starts the same collectives in the same order. Several may be in flight; of each type of
    chunks two, whose staging memory is then in use: starting a third first finishes the first one, on every rank.

    Args:
        group: the expert pool's process group; ``None`` for a pool of one rank. Its timeout holds here.
        group_rank: this rank's position in it.
        counter: where chunks and bytes sent to other ranks are counted.
        ranks_per_node: consecutive pool ranks that are one node, for two levels; None: direct.
        max_plans: plans that are remembered.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        group_rank: int,
        counter: TrafficCounter | None = None,
        *,
        ranks_per_node: int | None = None,
        max_plans: int = 256,
    ) -> None:
        self.group = group
        self.group_rank = group_rank
        self.num_ranks = 1 if group is None else group.size()
        self.counter = counter
        self.ranks_per_node = ranks_per_node
        nodes_of = self.num_ranks if ranks_per_node is None else ranks_per_node
        boxed = None if group is None else group.boxed()
        self._native = CLASSES.SparseCollectives(boxed, group_rank, nodes_of, max_plans)

    def plan(self, placement: Placement, *, everywhere: bool = False) -> SparsePlan:
        """This rank's plan under ``placement``: the one of before where it is among the last ``max_plans``.

        Raises:
            ValueError: the placement is for another number of ranks.
        """
        return SparsePlan.wrap(self._native.plan(*_arrays(placement), everywhere))

    def start_all_gather(
        self, plan: SparsePlan, owned_CL: Tensor, held_HL: Tensor, *, purpose: str = "gather"
    ) -> SparseWork:
        """Start to fill ``held_HL`` with the chunks of every expert that this rank holds, on all ranks of the group.

        Args:
            plan: this rank's plan.
            owned_CL: contiguous, the chunks that this rank owns. They are converted to the type of ``held_HL`` once.
            held_HL: contiguous, where the chunks go; every row is written. Chunks travel in its type. Version counters
                do not move.
            purpose: what the traffic is counted as.

        Raises:
            TypeError: a type that is no compute dtype.
            ValueError: a tensor or the plan does not fit.
            RuntimeError: an earlier collective has failed, or does so while it is finished here.
        """
        ticket = self._native.start_all_gather(plan.native, owned_CL, held_HL, purpose)
        return self._started(ticket, plan.sent_chunks("all_gather"), held_HL, purpose)

    def start_reduce_scatter(
        self, plan: SparsePlan, held_HL: Tensor, owned_CL: Tensor, *, purpose: str = "scatter"
    ) -> SparseWork:
        """Start to fill ``owned_CL`` with the sum of all holders' chunks, on all ranks of the group.

        Args:
            plan: this rank's plan, the all-gather's.
            held_HL: contiguous, this rank's contributions, float32 or float64. They travel in that type.
            owned_CL: contiguous, where the sums go, at least as wide; every row is written.
            purpose: what the traffic is counted as.

        Raises:
            ValueError: a tensor or the plan does not fit, or a type is too narrow.
            RuntimeError: an earlier collective has failed, or does so while it is finished here.
        """
        ticket = self._native.start_reduce_scatter(plan.native, held_HL, owned_CL, purpose)
        return self._started(ticket, plan.sent_chunks("reduce_scatter"), held_HL, purpose)

    def all_gather(self, plan: SparsePlan, owned_CL: Tensor, held_HL: Tensor, *, purpose: str = "gather") -> None:
        """``start_all_gather`` and wait."""
        self.start_all_gather(plan, owned_CL, held_HL, purpose=purpose).wait()

    def reduce_scatter(self, plan: SparsePlan, held_HL: Tensor, owned_CL: Tensor, *, purpose: str = "scatter") -> None:
        """``start_reduce_scatter`` and wait."""
        self.start_reduce_scatter(plan, held_HL, owned_CL, purpose=purpose).wait()

    def sent_bytes(self) -> list[int]:
        """Bytes handed to the process group so far, for each of the W ranks."""
        counts: list[int] = self._native.sent_bytes()
        return counts

    def arena_bytes(self) -> int:
        """Staging memory at present; it grows with the largest plan and stays."""
        return int(self._native.arena_bytes())

    def num_plans(self) -> int:
        """Plans remembered at present."""
        return int(self._native.num_plans())

    def _started(self, ticket: int, counts: list[int], held_HL: Tensor, purpose: str) -> SparseWork:
        if self.counter is not None and self.group is not None and any(counts):
            self.counter.add_rows(purpose, held_HL.shape[1] * held_HL.element_size(), counts, self.group)
        return SparseWork(self._native, ticket)


def _arrays(placement: Placement) -> tuple[Tensor, Tensor, Tensor, int, int]:
    return placement.owner_ES, placement.offset_E1, placement.holder_Z, placement.num_groups, placement.num_shards
