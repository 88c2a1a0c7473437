"""From an item of a plan to what one of its ranks computes. Shapes: T tokens of the rank."""

from collections.abc import Sequence as Series
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from moetrain.sequence.batch import GangShare, PackedBatch, Piece
from moetrain.sequence.plan import Item, SequencePlan


class OpenSequence(Protocol):
    """Tokens of one sequence, read where they are asked for."""

    @property
    def borders(self) -> Series[int]:
        """Where its documents begin, 0 first, and its number of tokens."""

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """int64 inputs and targets of [start, stop)."""


class SequenceSource(Protocol):
    """Sequences by their global ids."""

    def open(self, sequence_id: int) -> OpenSequence:
        """One sequence."""


def pack_item(plan: SequencePlan, item: Item | None, rank: int, source: SequenceSource) -> PackedBatch:
    """Read this rank's tokens of an item, and nothing else.

    A gang cuts each document by itself, so that no part of one sees another.

    Args:
        plan: of the step.
        item: what the rank does in a round; None where its lane is empty.
        rank: of the plan; one of the item's.
        source: of the plan's sequences.

    Raises:
        ValueError: a sequence is not as long as the plan says.
    """
    if item is None:
        return PackedBatch.empty()
    opened = {sequence.id: source.open(sequence.id) for sequence in plan.sequences_of(item)}
    for sequence in plan.sequences_of(item):
        found = opened[sequence.id].borders[-1]
        if found != sequence.num_tokens:
            raise ValueError(
                f"sequence {sequence.id} has {found} tokens, but the plan says {sequence.num_tokens}; give all ranks "
                "the data that the plan was made from"
            )
    documents = [(id, begin, end) for id, one in opened.items() for begin, end in pairwise(one.borders)]
    if len(item.ranks) == 1:
        pieces = tuple(Piece(id, begin, end, begin) for id, begin, end in documents)
        # Neighbours of one sequence are read at once.
        read = [one.read(0, one.borders[-1]) for one in opened.values()]
        return PackedBatch(*_joined(read), pieces)
    gang = GangShare(tuple(end - begin for _, begin, end in documents), item.ranks, item.ranks.index(rank))
    pieces = tuple(
        Piece(documents[i][0], documents[i][1] + start, documents[i][1] + stop, documents[i][1])
        for i, start, stop in gang.parts().pieces(gang.place)
    )
    read = [opened[piece.sequence].read(piece.start, piece.stop) for piece in pieces]
    return PackedBatch(*_joined(read), pieces, gang)


def _joined(read: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    none_T = torch.empty(0, dtype=torch.int64)
    token_id_T, target_T = (torch.cat([none_T, *parts]) for parts in (zip(*read, strict=True) if read else ((), ())))
    return token_id_T, target_T
