"""Where sequences go in one optimizer step: which ranks process which sequences together, and in which round.

The *order rule* (design: hybrid data parallelism): every item carries one round number, the same on all its ranks,
and on each rank gids and rounds ascend together. Then all ranks of an expert block can run the same rounds, with
empty lanes where they have no item, and no order of collectives can deadlock.
"""

import hashlib
from collections.abc import Sequence as Series
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

_FORMAT = 1
HEADER_LENGTH = 10  # int64 numbers in the first array of ``SequencePlan.to_arrays``


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a step's global batch: its global id and its sizes in tokens."""

    id: int
    num_tokens: int
    num_loss_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"Sequence {self.id}: num_tokens must be at least 1, got {self.num_tokens}; leave it out")
        if not 0 <= self.num_loss_tokens <= self.num_tokens:
            raise ValueError(
                f"Sequence {self.id}: num_loss_tokens must be between 0 and num_tokens ({self.num_tokens}), "
                f"got {self.num_loss_tokens}"
            )


@dataclass(frozen=True, slots=True)
class Item:
    """Sequences that ``ranks`` process together in one round: a pack on one rank, or a gang on several."""

    gid: int  # global order of launching, unique in the plan
    round: int
    sequence_ids: tuple[int, ...]
    ranks: tuple[int, ...]  # ascending
    offload_ratio: float = 0.0  # share of its activations kept in host memory
    est_ms: float = 0.0

    def __post_init__(self) -> None:
        if not self.sequence_ids or not self.ranks:
            raise ValueError(f"Item {self.gid} must have sequences and ranks, got {self}; leave its lane empty instead")
        if self.ranks[0] < 0 or any(a >= b for a, b in zip(self.ranks, self.ranks[1:], strict=False)):
            raise ValueError(f"Item {self.gid}: ranks must be distinct, ascending and >= 0, got {self.ranks}")
        if not 0.0 <= self.offload_ratio <= 1.0:
            raise ValueError(f"Item {self.gid}: offload_ratio must be between 0 and 1, got {self.offload_ratio}")

    def rank_tokens(self, num_tokens: int) -> int:
        """Tokens of one of its sequences that each of its ranks holds, padding included.

        A gang of d ranks cuts a sequence in 2d equal parts, head and tail paired (zigzag); one rank takes it whole.
        """
        num_ranks = len(self.ranks)
        return num_tokens if num_ranks == 1 else 2 * -(-num_tokens // (2 * num_ranks))


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """A valid plan of one step; making an invalid one raises ``ValueError``.

    Attributes:
        sequences: the global batch, in its order.
        items: ascending by gid.
        rank_gids: for each rank, the gids of its items, ascending.
        num_rounds: rounds that every rank runs; a rank without an item in a round has an empty lane there.
        capacity: tokens a rank can hold in one round, padding included.
        num_tokens: of all sequences.
        num_loss_tokens: of all sequences; the loss is a sum divided by it.
        lower_bound_ms: no plan of these sequences can take less; 0 where nothing was estimated.
        est_makespan_ms: estimated time of this plan; 0 where nothing was estimated.
    """

    sequences: tuple[Sequence, ...]
    items: tuple[Item, ...]
    rank_gids: tuple[tuple[int, ...], ...]
    num_rounds: int
    capacity: int
    num_tokens: int
    num_loss_tokens: int
    lower_bound_ms: float = 0.0
    est_makespan_ms: float = 0.0

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def build(
        cls,
        sequences: Series[Sequence],
        items: Series[Item],
        *,
        num_ranks: int,
        num_rounds: int,
        capacity: int,
        lower_bound_ms: float = 0.0,
        est_makespan_ms: float = 0.0,
    ) -> "SequencePlan":
        """Put items in gid order, derive what follows from them, and validate."""
        ordered = tuple(sorted(items, key=lambda item: item.gid))
        gids: list[list[int]] = [[] for _ in range(num_ranks)]
        for item in ordered:
            _require(item.ranks[-1] < num_ranks, f"item {item.gid} names rank {item.ranks[-1]} of {num_ranks}")
            for rank in item.ranks:
                gids[rank].append(item.gid)
        return cls(
            sequences=tuple(sequences),
            items=ordered,
            rank_gids=tuple(map(tuple, gids)),
            num_rounds=num_rounds,
            capacity=capacity,
            num_tokens=sum(sequence.num_tokens for sequence in sequences),
            num_loss_tokens=sum(sequence.num_loss_tokens for sequence in sequences),
            lower_bound_ms=lower_bound_ms,
            est_makespan_ms=est_makespan_ms,
        )

    @property
    def num_ranks(self) -> int:
        """Ranks that the plan is for."""
        return len(self.rank_gids)

    def items_of(self, rank: int) -> tuple[Item, ...]:
        """The items that ``rank`` takes part in, in launch order."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"SequencePlan: rank must be in [0, {self.num_ranks}), got {rank}")
        mine = set(self.rank_gids[rank])
        return tuple(item for item in self.items if item.gid in mine)

    def item_at(self, rank: int, round_idx: int) -> Item | None:
        """The item of ``rank`` in one round, or None where its lane is empty."""
        if not 0 <= round_idx < self.num_rounds:
            raise ValueError(f"SequencePlan: round must be in [0, {self.num_rounds}), got {round_idx}")
        return next((item for item in self.items_of(rank) if item.round == round_idx), None)

    def validate(self) -> None:
        """Prove that every token appears once, that no rank exceeds its capacity, and that the order rule holds.

        Raises:
            ValueError: naming the item, rank or sequence that breaks a rule.
        """
        self._check_totals()
        self._check_coverage()
        self._check_order()
        self._check_capacity()

    def _check_totals(self) -> None:
        for name in ("num_tokens", "num_loss_tokens"):
            total = sum(getattr(sequence, name) for sequence in self.sequences)
            _require(
                getattr(self, name) == total, f"{name} must be the sequences' sum {total}, got {getattr(self, name)}"
            )
        _require(self.num_ranks >= 1, "there must be at least one rank")
        _require(self.num_rounds >= 0, f"num_rounds must be at least 0, got {self.num_rounds}")

    def _check_coverage(self) -> None:
        wanted = [sequence.id for sequence in self.sequences]
        _require(len(set(wanted)) == len(wanted), f"sequence ids must be distinct, got {_repeated(wanted)} twice")
        planned = [sequence_id for item in self.items for sequence_id in item.sequence_ids]
        _require(len(set(planned)) == len(planned), f"sequence {_repeated(planned)} is planned twice")
        missing = set(wanted) - set(planned)
        _require(not missing, f"sequence {min(missing, default=None)} is in no item")
        unknown = set(planned) - set(wanted)
        _require(not unknown, f"sequence {min(unknown, default=None)} is planned but not in the batch")

    def _check_order(self) -> None:
        gids = [item.gid for item in self.items]
        _require(gids == sorted(set(gids)), f"items must ascend by distinct gid, got {gids}")
        seen: list[list[int]] = [[] for _ in range(self.num_ranks)]
        last_round = [-1] * self.num_ranks
        for item in self.items:
            _require(
                0 <= item.round < self.num_rounds,
                f"item {item.gid}: round must be in [0, {self.num_rounds}), got {item.round}",
            )
            for rank in item.ranks:
                _require(rank < self.num_ranks, f"item {item.gid} names rank {rank} of {self.num_ranks}")
                _require(
                    item.round > last_round[rank],
                    f"rank {rank}: item {item.gid} of round {item.round} comes after round {last_round[rank]}; "
                    "rounds must ascend with gids",
                )
                last_round[rank] = item.round
                seen[rank].append(item.gid)
        for rank, (listed, found) in enumerate(zip(self.rank_gids, seen, strict=True)):
            _require(list(listed) == found, f"rank {rank} lists gids {list(listed)}, but its items are {found}")

    def _check_capacity(self) -> None:
        num_tokens = {sequence.id: sequence.num_tokens for sequence in self.sequences}
        for item in self.items:
            held = sum(item.rank_tokens(num_tokens[sequence_id]) for sequence_id in item.sequence_ids)
            _require(
                held <= self.capacity,
                f"item {item.gid} puts {held} tokens on each of {len(item.ranks)} ranks, capacity is {self.capacity}; "
                "give it more ranks or fewer sequences",
            )

    def to_arrays(self) -> tuple[IntArray, IntArray]:
        """Two int64 arrays to broadcast: a header of ``HEADER_LENGTH`` numbers, its last the length of the body."""
        sequences = [(s.id, s.num_tokens, s.num_loss_tokens) for s in self.sequences]
        items = [(i.gid, i.round, len(i.sequence_ids), len(i.ranks)) for i in self.items]
        floats = [(i.offload_ratio, i.est_ms) for i in self.items]
        body = np.concatenate(
            [
                np.array(sequences, np.int64).reshape(-1),
                np.array(items, np.int64).reshape(-1),
                np.array(floats, np.float64).reshape(-1).view(np.int64),
                np.array([x for i in self.items for x in (*i.sequence_ids, *i.ranks)], np.int64),
            ]
        )
        bounds = np.array([self.lower_bound_ms, self.est_makespan_ms], np.float64).view(np.int64)
        sizes = [_FORMAT, self.num_ranks, self.num_rounds, self.capacity, len(sequences), len(items), 0]
        header = np.concatenate([np.array(sizes, np.int64), bounds, np.array([len(body)], np.int64)])
        return header, body

    @classmethod
    def from_arrays(cls, header: IntArray, body: IntArray) -> "SequencePlan":
        """Read back what ``to_arrays`` wrote, and validate it."""
        if header.shape != (HEADER_LENGTH,) or header[0] != _FORMAT or body.shape != (header[-1],):
            raise ValueError(
                f"SequencePlan.from_arrays: header {header.tolist()} and a body of {body.shape} numbers do not belong "
                f"together; broadcast both arrays of to_arrays (format {_FORMAT})"
            )
        _, num_ranks, num_rounds, capacity, num_sequences, num_items, _ = header[:7].tolist()
        bounds = header[7:9].copy().view(np.float64).tolist()
        parts = np.split(body, np.cumsum([3 * num_sequences, 4 * num_items, 2 * num_items]))
        sequences = [Sequence(*row) for row in parts[0].reshape(-1, 3).tolist()]
        floats = parts[2].copy().view(np.float64).reshape(-1, 2).tolist()
        flat, start, items = parts[3].tolist(), 0, []
        for (gid, round_idx, num_ids, num_item_ranks), estimates in zip(
            parts[1].reshape(-1, 4).tolist(), floats, strict=True
        ):
            middle, stop = start + num_ids, start + num_ids + num_item_ranks
            items.append(Item(gid, round_idx, tuple(flat[start:middle]), tuple(flat[middle:stop]), *estimates))
            start = stop
        return cls.build(
            sequences,
            items,
            num_ranks=num_ranks,
            num_rounds=num_rounds,
            capacity=capacity,
            lower_bound_ms=bounds[0],
            est_makespan_ms=bounds[1],
        )

    def content_hash(self) -> str:
        """SHA-256 over everything in the plan: equal on all ranks exactly if they hold the same plan."""
        digest = hashlib.sha256()
        for array in self.to_arrays():
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(f"SequencePlan: {message}")


def _repeated(ids: Series[int]) -> int | None:
    seen: set[int] = set()
    return next((x for x in ids if x in seen or seen.add(x)), None)  # type: ignore[func-returns-value]
