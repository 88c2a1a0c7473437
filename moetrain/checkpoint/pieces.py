"""What a checkpoint holds: logical tensors, of which each rank has some boxes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor: where it starts, and its values (a view of live memory)."""

    offset: tuple[int, ...]
    tensor: Tensor

    def chunk(self) -> ChunkStorageMetadata:
        """The box without its values, in DCP's words."""
        return ChunkStorageMetadata(offsets=Size(self.offset), sizes=self.tensor.size())


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as it would be on one rank, and the pieces of it that this rank writes, or wants to read.

    Over all ranks, the pieces written must tile the tensor: replicas write nothing. Pieces read may overlap.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for piece in self.pieces:
            ends = [start + size for start, size in zip(piece.offset, piece.tensor.shape, strict=True)]
            if len(ends) != len(self.shape) or any(end > size for end, size in zip(ends, self.shape, strict=True)):
                raise ValueError(
                    f"LogicalTensor: a piece must lie inside {list(self.shape)}, got one at {list(piece.offset)} "
                    f"of {list(piece.tensor.shape)}"
                )

    @staticmethod
    def whole(tensor: Tensor) -> "LogicalTensor":
        """All of ``tensor``."""
        return LogicalTensor(tuple(tensor.shape), (Piece((0,) * tensor.dim(), tensor),))

    @property
    def num_elements(self) -> int:
        """Elements of the logical tensor."""
        return prod(self.shape)


State = Mapping[str, LogicalTensor]
