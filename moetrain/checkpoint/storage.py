"""DCP storage: one safetensors file per rank, JSON metadata with checksums, committed by one rename.

A checkpoint is written into a hidden folder beside its final place. Every file is flushed to the disk before the
folder gets its name, so a folder with a name is complete; a crash leaves a hidden folder that the next save clears.
"""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from moetrain.checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry, file_digest
from moetrain.checkpoint.names import MANIFEST, data_file, draft_path, make_draft, own_files, stale_path, take_over


class SafetensorsWriter(StorageWriter):
    """Writes one checkpoint to ``final``."""

    def __init__(self, final: Path, *, step: int, rank: int, extra: dict[str, Any]) -> None:
        """Prepare to write; ``extra`` is JSON that is stored beside the tensors (the coordinator's counts)."""
        self._final = final
        self._draft = draft_path(final)
        self._step = step
        self._file = data_file(rank)
        self._extra = extra

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from earlier saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The coordinator clears what a crashed save may have left; others write only after the global plan."""
        if is_coordinator:
            make_draft(self._draft)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Keep the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file and flush it."""
        tensors: dict[str, Tensor] = {}
        results = []
        for item in plan.items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            entry = f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}"
            tensors[entry] = value.detach().cpu().contiguous().clone()
            results.append((item.index, value.numel() * value.element_size(), entry))
        path = self._draft / self._file
        save_file(tensors, path)
        _flush(path)
        stored = FileEntry(path.stat().st_size, file_digest(path))
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, size, (self._file, entry, stored)) for index, size, entry in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, then give the folder its name."""
        place = {result.index: result.storage_data for part in results for result in part}
        tensors = {
            key: _tensor_entry(key, entry, place)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        files = {file: stored for file, _, stored in place.values()}
        Manifest(step=self._step, tensors=tensors, files=files, extra=self._extra).write(self._draft)
        for path in own_files(self._draft):
            if path.name not in files and path.name != MANIFEST:
                path.unlink()  # of a rank that owned nothing
        _flush(self._draft)
        _replace(self._draft, self._final)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


class SafetensorsReader(StorageReader):
    """Reads the checkpoint in ``folder``, whose checksums the caller has verified."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Prepare to read what ``manifest`` says is there."""
        self._folder = folder
        self._manifest = manifest
        self._place: dict[MetadataIndex, Chunk] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from earlier loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest in DCP's words."""
        tensors = self._manifest.tensors
        return Metadata(
            state_dict_metadata={
                key: TensorStorageMetadata(
                    properties=TensorProperties(dtype=getattr(torch, entry.dtype)),
                    size=Size(entry.shape),
                    chunks=[ChunkStorageMetadata(Size(chunk.offset), Size(chunk.shape)) for chunk in entry.chunks],
                )
                for key, entry in tensors.items()
            },
            storage_data={
                MetadataIndex(key, Size(chunk.offset)): chunk
                for key, entry in tensors.items()
                for chunk in entry.chunks
            },
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember where each chunk is."""
        self._place = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Keep the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every item's box into its target; each file is opened once."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._place[item.storage_index].file].append(item)
        for name, items in sorted(by_file.items()):
            with safe_open(self._folder / name, framework="pt") as file:
                for item in items:
                    target = planner.resolve_tensor(item)
                    target.copy_(_read_box(file, self._place[item.storage_index].entry, item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path will do."""
        return True


def _read_box(file: Any, entry: str, item: ReadItem) -> Tensor:
    if not item.lengths:
        return torch.as_tensor(file.get_tensor(entry))
    box = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
    return torch.as_tensor(file.get_slice(entry)[box])


def _tensor_entry(key: str, entry: TensorStorageMetadata, place: dict[MetadataIndex, Any]) -> TensorEntry:
    chunks = []
    for chunk in entry.chunks:
        file, name, _ = place[MetadataIndex(key, chunk.offsets)]
        chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, name))
    return TensorEntry(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."), tuple(chunks))


def _replace(draft: Path, final: Path) -> None:
    """Rename ``draft`` to ``final``; a damaged checkpoint of the same name moves out of the way first.

    What is in that one and no run has written, as a user's notes, is taken over.
    """
    stale = stale_path(final)
    take_over(stale, draft)  # of a save that was killed here
    if final.exists():
        final.rename(stale)
    draft.rename(final)
    _flush(final.parent)
    take_over(stale, final)


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
