"""``metadata.json``: what is in a checkpoint, where, and the checksums that say it is unchanged.

The file is ``{"sha256": ..., "body": {...}}``; the checksum is that of the body written with sorted keys. JSON and
safetensors hold data alone: reading a checkpoint cannot run code from it.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.checkpoint.errors import CorruptCheckpointError
from moetrain.checkpoint.names import FORMAT, MANIFEST

VERSION = 2  # 1 kept an expert as one flat vector
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and the entry of the safetensors file that holds it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    entry: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One logical tensor."""

    shape: tuple[int, ...]
    dtype: str  # as "float32"
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One data file: its size and checksum."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but its values. ``extra`` is the caller's own JSON."""

    step: int
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``metadata.json`` into ``folder`` and flush it to the disk."""
        body = self._body()
        text = json.dumps({"sha256": _digest(body), "body": body}, indent=1, sort_keys=True)
        path = folder / MANIFEST
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def sha256(self) -> str:
        """The checksum that ``metadata.json`` states: equal for copies of a checkpoint, and for no other one."""
        return _digest(self._body())

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "extra": self.extra,
            "files": {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in self.files.items()},
            "tensors": {key: _tensor_to_json(entry) for key, entry in self.tensors.items()},
        }

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Read and check ``metadata.json``; the data files are checked by ``check_file``.

        Raises:
            CorruptCheckpointError: the file is missing, not JSON, changed, or of another format.
        """
        try:
            outer = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            body, stated = outer["body"], outer["sha256"]
        except FileNotFoundError as error:
            raise CorruptCheckpointError(folder, f"{MANIFEST} is missing") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(folder, f"{MANIFEST} cannot be read ({error})") from error
        if _digest(body) != stated:
            raise CorruptCheckpointError(folder, f"{MANIFEST} does not match its checksum")
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise CorruptCheckpointError(folder, f"format {body['format']} version {body['version']} is unknown")
        return Manifest(
            step=body["step"],
            tensors={key: _tensor_from_json(entry) for key, entry in body["tensors"].items()},
            files={name: FileEntry(file["bytes"], file["sha256"]) for name, file in body["files"].items()},
            extra=body["extra"],
        )


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise ``CorruptCheckpointError`` unless every file is there and as long as the manifest states."""
    for name, stated in manifest.files.items():
        _check_size(folder, name, stated)


def check_file(folder: Path, name: str, stated: FileEntry) -> None:
    """Raise ``CorruptCheckpointError`` unless the file has the size and checksum that the manifest states."""
    _check_size(folder, name, stated)
    if file_digest(folder / name) != stated.sha256:
        raise CorruptCheckpointError(folder, f"{name} does not match its checksum")


def _check_size(folder: Path, name: str, stated: FileEntry) -> None:
    path = folder / name
    if not path.is_file():
        raise CorruptCheckpointError(folder, f"{name} is missing")
    if (size := path.stat().st_size) != stated.num_bytes:
        raise CorruptCheckpointError(folder, f"{name} has {size} bytes instead of {stated.num_bytes}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    chunks = [
        {"offset": list(chunk.offset), "shape": list(chunk.shape), "file": chunk.file, "entry": chunk.entry}
        for chunk in entry.chunks
    ]
    return {"shape": list(entry.shape), "dtype": entry.dtype, "chunks": chunks}


def _tensor_from_json(entry: dict[str, Any]) -> TensorEntry:
    chunks = tuple(
        Chunk(tuple(chunk["offset"]), tuple(chunk["shape"]), chunk["file"], chunk["entry"]) for chunk in entry["chunks"]
    )
    return TensorEntry(tuple(entry["shape"]), entry["dtype"], chunks)
