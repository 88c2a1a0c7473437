"""What a checkpoint holds: logical tensors, of which each rank has some boxes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata


@dataclass(frozen=True, slots=True)
class TensorShard:
    """A box of a logical tensor: where it starts, and its values (a view of live memory)."""

    offset: tuple[int, ...]
    tensor: Tensor

    def chunk(self) -> ChunkStorageMetadata:
        """The box without its values, in DCP's words."""
        return ChunkStorageMetadata(offsets=Size(self.offset), sizes=self.tensor.size())


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor as it would be on one rank, and the shards of it that this rank writes, or wants to read.

    Over all ranks, the shards written must tile the tensor: replicas write nothing. Shards read may overlap.
    """

    shape: tuple[int, ...]
    shards: tuple[TensorShard, ...]

    def __post_init__(self) -> None:
        for shard in self.shards:
            ends = [start + size for start, size in zip(shard.offset, shard.tensor.shape, strict=True)]
            if len(ends) != len(self.shape) or any(end > size for end, size in zip(ends, self.shape, strict=True)):
                raise ValueError(
                    f"LogicalTensor: a shard must lie inside {list(self.shape)}, got one at {list(shard.offset)} "
                    f"of {list(shard.tensor.shape)}"
                )

    @staticmethod
    def whole(tensor: Tensor) -> "LogicalTensor":
        """All of ``tensor``."""
        return LogicalTensor(tuple(tensor.shape), (TensorShard((0,) * tensor.dim(), tensor),))


State = Mapping[str, LogicalTensor]
