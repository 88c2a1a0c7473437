"""DCP planners for logical tensors in shards; ``moetrain.checkpoint.storage`` does the reading and writing."""

import io
from math import prod
from typing import Any

from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moetrain.checkpoint.shards import LogicalTensor


class ShardSavePlanner(SavePlanner):
    """One write item per shard."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Remember what to save."""
        self._state: dict[str, LogicalTensor] = state_dict

    def create_local_plan(self) -> SavePlan:
        """Name every non-empty shard of this rank."""
        items = [
            WriteItem(
                index=MetadataIndex(key, Size(shard.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=shard.chunk(),
                    properties=TensorProperties.create_from_tensor(shard.tensor),
                    size=Size(logical.shape),
                ),
            )
            for key, logical in self._state.items()
            for shard in logical.shards
            if shard.tensor.numel() > 0
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Merge the ranks' plans; every tensor must be written completely and once."""
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            written = sum(prod(chunk.sizes) for chunk in entry.chunks)
            if written != prod(entry.size):
                raise ValueError(
                    f"checkpoint: the shards of {key} must tile its {prod(entry.size)} elements once, "
                    f"but they have {written}; replicas must not write, and every owner must"
                )
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Keep the plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The values of one item."""
        return _find(self._state, write_item.index)


class ShardLoadPlanner(LoadPlanner):
    """Reads, for every shard of this rank, whichever boxes the checkpoint has of it."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Remember what to fill, and what there is."""
        assert metadata is not None
        self._state: dict[str, LogicalTensor] = state_dict
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Match shards with what was saved."""
        items: list[ReadItem] = []
        for key, logical in self._state.items():
            shards = [shard for shard in logical.shards if shard.tensor.numel() > 0]
            saved = self._saved(key, logical)
            found = create_read_items_for_chunk_list(key, saved, [shard.chunk() for shard in shards])
            if sum(prod(item.lengths) for item in found) != sum(shard.tensor.numel() for shard in shards):
                raise ValueError(
                    f"checkpoint: {key} is not complete in the checkpoint; remove it to go on from an older one, or "
                    "restore it from a copy"
                )
            items += found
        return LoadPlan(items)

    def _saved(self, key: str, logical: LogicalTensor) -> TensorStorageMetadata:
        saved = self._metadata.state_dict_metadata.get(key)
        if not isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"checkpoint: it must hold {key}, but does not; it is of another model or optimizer")
        if tuple(saved.size) != logical.shape:
            raise ValueError(
                f"checkpoint: {key} must be {list(logical.shape)}, the checkpoint has {list(saved.size)}; "
                "load it with the configuration it was saved with"
            )
        return saved

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks read independently."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Keep the plan as it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Checkpoints of ours hold tensors alone."""
        raise ValueError("checkpoint: only tensors are stored; this is not a checkpoint of moetrain")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a live tensor that one item fills."""
        target: Any = _find(self._state, read_item.dest_index)
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Values were written in place."""


def _find(state: dict[str, LogicalTensor], index: MetadataIndex) -> Tensor:
    offset = tuple(index.offset or ())
    for shard in state[index.fqn].shards:
        if shard.offset == offset and shard.tensor.numel() > 0:
            return shard.tensor.detach()
    raise KeyError(f"{index.fqn} has no shard at {offset}")
