r"""Megatron's indexed dataset: token streams in ``X.bin``, an index in ``X.idx``.

Layout of ``X.idx``, little-endian: the magic ``b"MMIDIDX\0\0"``, u64 version 1, u8 dtype code, u64 sequences n, u64
entries m of the document index; then int32 sizes [n] in tokens, int64 pointers [n] in bytes into ``X.bin``, int64
document index [m]: document i is the sequences [doc_idx[i], doc_idx[i + 1]). Files are interchangeable with
Megatron-Core's ``IndexedDataset`` (text; not its multimodal variant).
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_COUNTS = struct.Struct("<QBQQ")  # version, dtype code, sequences, entries of the document index
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_MAX_TOKENS = 2**31 - 1  # a size is an int32


def dtype_code(dtype: DTypeLike) -> int:
    """Megatron's number for a numpy dtype."""
    wanted = np.dtype(dtype)
    for code, name in _DTYPES.items():
        if np.dtype(name) == wanted:
            return code
    raise ValueError(
        f"indexed dataset: dtype must be one of {_dtype_names()}, got {wanted}; uint16 suits most tokenizers"
    )


class IndexedWriter:
    """Writes documents one after another; both files appear, whole, when the ``with`` block ends without an error.

    The index is renamed last, so where ``X.idx`` exists ``X.bin`` is complete.
    """

    def __init__(self, prefix: Path, dtype: DTypeLike) -> None:
        self._code = dtype_code(dtype)
        self._dtype = np.dtype(_DTYPES[self._code])
        self._final = (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
        self._partial = tuple(path.with_name(f".{path.name}.{os.getpid()}.partial") for path in self._final)
        self._bin = self._partial[0].open("wb")
        self._sizes: list[int] = []
        self._doc_idx: list[int] = [0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()
            return
        try:
            self._finish()
        except BaseException:
            self.discard()
            raise

    def add_document(self, token_id_T: NDArray[Any]) -> None:
        """Append one document of one sequence. Tokens must fit the dtype; zero tokens are allowed."""
        if token_id_T.ndim != 1:
            raise ValueError(f"IndexedWriter.add_document: tokens must be [T], got shape {token_id_T.shape}")
        if len(token_id_T) > _MAX_TOKENS:
            raise ValueError(f"IndexedWriter: a document holds at most {_MAX_TOKENS} tokens, got {len(token_id_T)}")
        stored = token_id_T.astype(self._dtype)
        if stored.dtype != token_id_T.dtype and not np.array_equal(stored, token_id_T):
            raise ValueError(
                f"IndexedWriter: document {len(self._sizes)} has ids from {token_id_T.min()} to {token_id_T.max()}, "
                f"which {self._dtype} cannot hold; use a wider dtype"
            )
        self._bin.write(stored.tobytes())
        self._sizes.append(len(stored))
        self._doc_idx.append(len(self._sizes))

    def discard(self) -> None:
        """Close and remove the partial files."""
        self._bin.close()
        for path in self._partial:
            path.unlink(missing_ok=True)

    def _finish(self) -> None:
        _sync_and_close(self._bin)
        sizes = np.array(self._sizes, np.int64)
        pointers = (np.cumsum(sizes) - sizes) * self._dtype.itemsize
        index = self._partial[1].open("wb")
        index.write(MAGIC + _COUNTS.pack(VERSION, self._code, len(sizes), len(self._doc_idx)))
        index.write(sizes.astype("<i4").tobytes())
        index.write(pointers.astype("<i8").tobytes())
        index.write(np.array(self._doc_idx, "<i8").tobytes())
        _sync_and_close(index)
        for partial, final in zip(self._partial, self._final, strict=True):
            partial.replace(final)


class IndexedReader:
    """A checked, memory-mapped view of one indexed dataset.

    Attributes:
        tokens: the whole ``X.bin`` as one array.
        start_N: int64 first token of each sequence, as an index into ``tokens``.
        size_N: int64 tokens of each sequence.
        doc_idx: int64; document i is the sequences [doc_idx[i], doc_idx[i + 1]).

    Raises:
        ValueError: where the files are damaged, truncated or do not belong together; the message says which and how.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise ValueError(f"indexed dataset {self.prefix}: {path} is missing; write the dataset again")
        raw = idx_path.read_bytes()
        self.dtype, num_sequences, num_entries = self._read_header(raw)
        self.size_N, pointers, self.doc_idx = self._read_arrays(raw, num_sequences, num_entries)
        bin_bytes = bin_path.stat().st_size
        self._check(pointers, bin_bytes)
        self.start_N = pointers // self.dtype.itemsize
        self.tokens: NDArray[Any] = (
            np.memmap(bin_path, dtype=self.dtype, mode="r", shape=(bin_bytes // self.dtype.itemsize,))
            if bin_bytes
            else np.empty(0, self.dtype)
        )

    def __len__(self) -> int:
        """Sequences; also documents, in what ``IndexedWriter`` writes."""
        return len(self.size_N)

    @property
    def num_documents(self) -> int:
        """Documents, each one or more sequences."""
        return len(self.doc_idx) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.size_N.sum())

    def sequence(self, idx: int) -> NDArray[Any]:
        """Tokens [T] of one sequence, a view of the file."""
        if not 0 <= idx < len(self):
            raise IndexError(f"indexed dataset {self.prefix}: sequence {idx} of {len(self)}")
        return self.tokens[self.start_N[idx] : self.start_N[idx] + self.size_N[idx]]

    def _read_header(self, raw: bytes) -> tuple[np.dtype[Any], int, int]:
        head = len(MAGIC) + _COUNTS.size
        self._require(
            raw[: len(MAGIC)] == MAGIC,
            f"the index must begin with {MAGIC!r}, got {raw[: len(MAGIC)]!r}; it is not a Megatron .idx file",
        )
        self._require(len(raw) >= head, f"the index is truncated: {len(raw)} bytes, its header alone has {head}")
        version, code, num_sequences, num_entries = _COUNTS.unpack_from(raw, len(MAGIC))
        self._require(version == VERSION, f"the index has version {version}, only {VERSION} can be read")
        self._require(code in _DTYPES, f"dtype code must be one of {sorted(_DTYPES)} ({_dtype_names()}), got {code}")
        expected = head + 12 * num_sequences + 8 * num_entries
        fault = "truncated" if len(raw) < expected else "too long (multimodal modes are not read)"
        self._require(
            len(raw) == expected,
            f"the index must have {expected} bytes for {num_sequences} sequences and {num_entries} document entries, "
            f"got {len(raw)}; it is {fault}",
        )
        return np.dtype(_DTYPES[code]), num_sequences, num_entries

    def _read_arrays(self, raw: bytes, num_sequences: int, num_entries: int) -> tuple[NDArray[np.int64], ...]:
        at = len(MAGIC) + _COUNTS.size
        sizes = np.frombuffer(raw, "<i4", num_sequences, at).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", num_sequences, at + 4 * num_sequences).astype(np.int64)
        doc_idx = np.frombuffer(raw, "<i8", num_entries, at + 12 * num_sequences).astype(np.int64)
        return sizes, pointers, doc_idx

    def _check(self, pointers: NDArray[np.int64], bin_bytes: int) -> None:
        itemsize = self.dtype.itemsize
        self._require(bin_bytes % itemsize == 0, f"the .bin has {bin_bytes} bytes, no multiple of {itemsize}")
        self._require_all(self.size_N >= 0, self.size_N, "sizes must be at least 0")
        self._require_all(
            (pointers >= 0) & (pointers % itemsize == 0), pointers, f"pointers must be multiples of {itemsize}"
        )
        stop = pointers + self.size_N * itemsize
        self._require_all(stop <= bin_bytes, stop, f"every sequence must end inside the .bin's {bin_bytes} bytes")
        entries = self.doc_idx
        self._require(
            len(entries) > 0
            and entries[0] == 0
            and entries[-1] == len(self.size_N)
            and bool((np.diff(entries) >= 0).all()),
            f"the document index must ascend from 0 to the number of sequences, {len(self.size_N)}",
        )

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"indexed dataset {self.prefix}: {message}; write the dataset again")

    def _require_all(self, holds: NDArray[np.bool_], values: NDArray[np.int64], rule: str) -> None:
        if not holds.all():
            first = int(np.argmin(holds))
            self._require(False, f"{rule}, but sequence {first} has {values[first]}; a file is truncated or damaged")


def _sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _dtype_names() -> str:
    return ", ".join(np.dtype(name).name for name in _DTYPES.values())
