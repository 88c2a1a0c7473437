"""Where sequences go in one optimizer step: which ranks process which sequences together, and in which round.

Shapes: N sequences, I items, M ranks of all items, R ranks.

The *order rule*: every item has one round number, the same on all its ranks, and on each rank rounds ascend; the ranks
of a block, which share all-to-alls, run the same number of rounds, and so do blocks that a gang joins. A rank without
an item in a round has an empty lane there. Then no order of collectives can deadlock.

A plan is arrays: at 256 million tokens on 12,288 ranks Python objects would take half a second to make, and as long to
decode on every rank. ``Item`` and ``Sequence`` are made for what is asked for alone.
"""

import hashlib
import struct
from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.config.errors import require
from moetrain.ops import check_sequence_plan

Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Floats = NDArray[np.float64]

_FORMAT = 2
HEADER_LENGTH = 10  # int64 numbers in the first array of ``SequencePlan.to_arrays``
# Of the second array, in order: 8-byte numbers first, so that all are aligned.
_DTYPES = ("<i8", "<i8", "<i8", "<f8", "<f8", "<i4", "<i4", "<i4", "<i4")


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a step's global batch: its global id and its sizes in tokens."""

    id: int
    num_tokens: int
    num_loss_tokens: int


@dataclass(frozen=True, slots=True)
class Item:
    """Sequences that ``ranks`` process together in one round: a pack on one rank, or a gang on several."""

    gid: int  # its place in the order of launching
    round: int
    sequence_ids: tuple[int, ...]
    ranks: tuple[int, ...]  # ascending; a gang's ring goes round them
    offload_ratio: float = 0.0  # share of its activations kept in host memory
    est_ms: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class SequencePlan:
    """A valid plan of one step; making an invalid one raises ``ValueError``.

    Attributes:
        sequence_N3: int64, id, tokens and loss tokens of each sequence of the global batch, in its order.
        round_I: int32, of each item; items stand in the order of launching.
        offset_I1: int64, where each item's members begin.
        member_N: int32, rows of ``sequence_N3``, item by item.
        rank_offset_I1: int64, where each item's ranks begin.
        rank_M: int32, ranks of each item, ascending.
        offload_I: float64, share of each item's activations kept in host memory.
        est_ms_I: float64, estimated time of each item; 0 where nothing was estimated.
        rounds_R: int32, rounds that each rank runs.
        block: neighbouring ranks that share all-to-alls.
        capacity: tokens whose activations a rank can hold in one round.
        num_layers: layers that have activations, for what offloading frees; 0 where none is offloaded.
        lower_bound_ms: no plan of these sequences can take less; 0 where nothing was estimated.
        est_makespan_ms: estimated time of this plan; 0 where nothing was estimated.
    """

    sequence_N3: Ints
    round_I: Ints32
    offset_I1: Ints
    member_N: Ints32
    rank_offset_I1: Ints
    rank_M: Ints32
    offload_I: Floats
    est_ms_I: Floats
    rounds_R: Ints32
    block: int = 1
    capacity: int = 0
    num_layers: int = 0
    lower_bound_ms: float = 0.0
    est_makespan_ms: float = 0.0

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def of_items(
        cls,
        sequences: Iterable[Sequence],
        items: Iterable[Item],
        *,
        num_ranks: int,
        capacity: int,
        block: int = 1,
        num_layers: int = 0,
        rounds: Series[int] | None = None,
    ) -> "SequencePlan":
        """Make a plan of objects, which suits small ones.

        Args:
            sequences: the global batch.
            items: in the order of launching; ``gid`` counts for nothing.
            num_ranks: R.
            capacity: tokens whose activations a rank can hold in one round.
            block: neighbouring ranks that share all-to-alls.
            num_layers: layers that have activations.
            rounds: of each rank; where they are left out all run as many as the last item needs.

        Raises:
            ValueError: the plan breaks a rule.
        """
        rows, made = list(sequences), list(items)
        row_of = {sequence.id: row for row, sequence in enumerate(rows)}
        for item in made:
            for sequence_id in item.sequence_ids:
                require(sequence_id in row_of, f"SequencePlan: sequence {sequence_id} is planned but not in the batch")
        members = [row_of[sequence_id] for item in made for sequence_id in item.sequence_ids]
        missing = set(range(len(rows))) - set(members)
        require(not missing, f"SequencePlan: sequence {rows[min(missing, default=0)].id if rows else 0} is in no item")
        require(len(members) == len(rows), f"SequencePlan: sequence {_repeated(rows, members)} is planned twice")
        same = max((item.round for item in made), default=-1) + 1
        return cls(
            sequence_N3=np.array([(s.id, s.num_tokens, s.num_loss_tokens) for s in rows], np.int64).reshape(-1, 3),
            round_I=np.array([item.round for item in made], np.int32),
            offset_I1=np.cumsum([0, *(len(item.sequence_ids) for item in made)], dtype=np.int64),
            member_N=np.array(members, np.int32),
            rank_offset_I1=np.cumsum([0, *(len(item.ranks) for item in made)], dtype=np.int64),
            rank_M=np.array([rank for item in made for rank in item.ranks], np.int32),
            offload_I=np.array([item.offload_ratio for item in made], np.float64),
            est_ms_I=np.array([item.est_ms for item in made], np.float64),
            rounds_R=np.full(num_ranks, same, np.int32) if rounds is None else np.array(rounds, np.int32),
            block=block,
            capacity=capacity,
            num_layers=num_layers,
        )

    @property
    def num_ranks(self) -> int:
        """R."""
        return len(self.rounds_R)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.round_I)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.sequence_N3[:, 1].sum())

    @property
    def num_loss_tokens(self) -> int:
        """Tokens with a target of all sequences; the loss is a sum divided by it."""
        return int(self.sequence_N3[:, 2].sum())

    def num_rounds(self, rank: int) -> int:
        """Rounds that a rank runs."""
        self._check_rank(rank)
        return int(self.rounds_R[rank])

    def offload_of(self, rank: int) -> list[float]:
        """By round, the share of a rank's activations that waits on the host; 0 where its lane is empty."""
        shares = [0.0] * self.num_rounds(rank)
        for item in self.items_of(rank):
            shares[item.round] = item.offload_ratio
        return shares

    def items_of(self, rank: int) -> tuple[Item, ...]:
        """The items that ``rank`` takes part in, in the order of launching."""
        self._check_rank(rank)
        places = np.flatnonzero(self.rank_M == rank)
        return tuple(self.item(int(gid)) for gid in np.searchsorted(self.rank_offset_I1, places, side="right") - 1)

    def item_at(self, rank: int, round_idx: int) -> Item | None:
        """The item of ``rank`` in one round, or None where its lane is empty."""
        require(
            0 <= round_idx < self.num_rounds(rank),
            f"SequencePlan: round must be in [0, {self.num_rounds(rank)}), which rank {rank} runs, got {round_idx}",
        )
        return next((item for item in self.items_of(rank) if item.round == round_idx), None)

    def item(self, gid: int) -> Item:
        """One item."""
        members = self.member_N[self.offset_I1[gid] : self.offset_I1[gid + 1]]
        ranks = self.rank_M[self.rank_offset_I1[gid] : self.rank_offset_I1[gid + 1]]
        return Item(
            gid,
            int(self.round_I[gid]),
            tuple(self.sequence_N3[members, 0].tolist()),
            tuple(ranks.tolist()),
            float(self.offload_I[gid]),
            float(self.est_ms_I[gid]),
        )

    def all_items(self) -> tuple[Item, ...]:
        """Every item: of small plans."""
        return tuple(map(self.item, range(self.num_items)))

    def sequences_of(self, item: Item) -> tuple[Sequence, ...]:
        """The sequences of one item."""
        members = self.member_N[self.offset_I1[item.gid] : self.offset_I1[item.gid + 1]]
        return tuple(Sequence(*row) for row in self.sequence_N3[members].tolist())

    def num_tokens_of_ranks(self) -> Ints:
        """int64 [R]: tokens that each rank computes in the step."""
        found = np.zeros(self.num_ranks, np.int64)
        num_tokens_N = self.sequence_N3[self.member_N, 1]
        size_I, first_I = np.diff(self.rank_offset_I1), self.rank_offset_I1[:-1]
        alone = size_I == 1
        of_item = np.add.reduceat(num_tokens_N, self.offset_I1[:-1]) if self.num_items else np.empty(0, np.int64)
        np.add.at(found, self.rank_M[first_I[alone]], of_item[alone])
        for gid in np.flatnonzero(~alone):
            ranks = self.rank_M[first_I[gid] : first_I[gid] + size_I[gid]]
            n_S1 = num_tokens_N[self.offset_I1[gid] : self.offset_I1[gid + 1], None]
            cuts = np.arange(2 * size_I[gid] + 1) * n_S1 // (2 * size_I[gid])
            part_D2 = np.diff(cuts, axis=1).sum(axis=0)
            found[ranks] += part_D2[: len(ranks)] + part_D2[::-1][: len(ranks)]
        return found

    def validate(self) -> None:
        """Prove that every token appears once, that no rank exceeds its capacity, and that the order rule holds.

        Raises:
            ValueError: naming the item, rank or sequence that breaks a rule.
            TypeError: an array is of another type.
        """
        require(
            self.sequence_N3.ndim == 2 and self.sequence_N3.shape[1:] == (3,),
            f"SequencePlan: sequence must be [N, 3], got {list(self.sequence_N3.shape)}",
        )
        arrays = map(torch.from_numpy, self._arrays())
        sequence, offset, rank_offset, offload, est_ms, round_, member, rank, rounds = arrays
        check_sequence_plan(
            sequence, round_, offset, member, rank_offset, rank, offload, est_ms, rounds,
            block=self.block, capacity=self.capacity, num_layers=self.num_layers,
        )  # fmt: skip

    def to_arrays(self) -> tuple[Ints, NDArray[np.uint8]]:
        """The whole plan as ``HEADER_LENGTH`` numbers, which tell the second array's size last, and bytes."""
        content = np.concatenate([array.reshape(-1).view(np.uint8) for array in self._arrays()])
        bounds = struct.unpack("<2q", struct.pack("<2d", self.lower_bound_ms, self.est_makespan_ms))
        sizes = (len(self.sequence_N3), self.num_items, len(self.rank_M), self.num_ranks)
        header = (_FORMAT, *sizes, self.block, self.capacity, self.num_layers, *bounds)
        return np.array(header, np.int64), content

    @staticmethod
    def size_of_content(header: Ints) -> int:
        """Bytes of the second array, which whoever receives a plan makes room for.

        Raises:
            ValueError: the header is of another version.
        """
        require(
            len(header) == HEADER_LENGTH and int(header[0]) == _FORMAT,
            f"SequencePlan: the header must be {HEADER_LENGTH} numbers that begin with {_FORMAT}, got "
            f"{header[:1].tolist()} of {len(header)}; give all ranks one version of moetrain",
        )
        return sum(size * np.dtype(dtype).itemsize for size, dtype in zip(_sizes(header), _DTYPES, strict=True))

    @classmethod
    def from_arrays(cls, header: Ints, content: NDArray[np.uint8]) -> "SequencePlan":
        """Take what ``to_arrays`` gave, without copying it.

        Raises:
            ValueError: it is not one plan's.
        """
        wanted = cls.size_of_content(header)
        require(len(content) == wanted, f"SequencePlan: the header announces {wanted} bytes, got {len(content)}")
        found: list[NDArray[np.generic]] = []
        start = 0
        for size, dtype in zip(_sizes(header), _DTYPES, strict=True):
            stop = start + size * np.dtype(dtype).itemsize
            found.append(content[start:stop].view(dtype))
            start = stop
        sequence, offset, rank_offset, offload, est_ms, round_, member, rank, rounds = found
        bounds = struct.unpack("<2d", header[8:10].astype("<i8").tobytes())
        return cls(
            sequence_N3=sequence.reshape(-1, 3),  # type: ignore[arg-type]
            round_I=round_,  # type: ignore[arg-type]
            offset_I1=offset,  # type: ignore[arg-type]
            member_N=member,  # type: ignore[arg-type]
            rank_offset_I1=rank_offset,  # type: ignore[arg-type]
            rank_M=rank,  # type: ignore[arg-type]
            offload_I=offload,  # type: ignore[arg-type]
            est_ms_I=est_ms,  # type: ignore[arg-type]
            rounds_R=rounds,  # type: ignore[arg-type]
            block=int(header[5]),
            capacity=int(header[6]),
            num_layers=int(header[7]),
            lower_bound_ms=bounds[0],
            est_makespan_ms=bounds[1],
        )

    def content_hash(self) -> str:
        """SHA-256 over everything in the plan: equal on all ranks exactly if they hold the same plan."""
        header, content = self.to_arrays()
        digest = hashlib.sha256(header.astype("<i8").tobytes())
        digest.update(content.data)
        return digest.hexdigest()

    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        """All arrays, in the order of ``_DTYPES``."""
        return (
            *(self.sequence_N3, self.offset_I1, self.rank_offset_I1, self.offload_I, self.est_ms_I),
            *(self.round_I, self.member_N, self.rank_M, self.rounds_R),
        )

    def _check_rank(self, rank: int) -> None:
        require(0 <= rank < self.num_ranks, f"SequencePlan: rank must be in [0, {self.num_ranks}), got {rank}")


def _sizes(header: Ints) -> tuple[int, ...]:
    """Numbers of each array, in the order of ``_DTYPES``."""
    num_sequences, num_items, num_item_ranks, num_ranks = map(int, header[1:5])
    longs = (3 * num_sequences, num_items + 1, num_items + 1, num_items, num_items)
    return (*longs, num_items, num_sequences, num_item_ranks, num_ranks)


def _repeated(rows: Series[Sequence], members: Series[int]) -> int | None:
    """The id of the first one that is there twice."""
    seen: set[int] = set()
    return next((rows[row].id for row in members if row in seen or seen.add(row)), None)  # type: ignore[func-returns-value]
