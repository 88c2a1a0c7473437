import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.indexed import MAGIC, IndexedReader, IndexedWriter, dtype_code

DOCUMENTS = [[3, 1, 4, 1, 5], [], [9], [2, 6, 258]]
HEAD = len(MAGIC) + 25  # bytes before the sizes


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.int64))
    return prefix


def test_layout_is_megatrons(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    assert Path(tmp_path / "x.bin").read_bytes() == struct.pack("<9H", 3, 1, 4, 1, 5, 9, 2, 6, 258)
    wanted = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 5)
    wanted += struct.pack("<4i", 5, 0, 1, 3) + struct.pack("<4q", 0, 10, 10, 12) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert Path(tmp_path / "x.idx").read_bytes() == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_read_back(tmp_path: Path) -> None:
    reader = IndexedReader(write(tmp_path / "x", DOCUMENTS))
    assert [reader.sequence(i).tolist() for i in range(len(reader))] == DOCUMENTS
    assert (reader.num_documents, reader.num_tokens, reader.dtype) == (4, 9, np.dtype(np.uint16))
    assert reader.start_N.tolist() == [0, 5, 5, 6]
    with pytest.raises(IndexError, match="sequence 4 of 4"):
        reader.sequence(4)


def test_no_documents(tmp_path: Path) -> None:
    reader = IndexedReader(write(tmp_path / "x", []))
    assert (len(reader), reader.num_tokens, reader.tokens.shape) == (0, 0, (0,))


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 1), ("i1", 2), ("i2", 3), ("i4", 4), ("i8", 5), ("f8", 6), ("f4", 7), ("u2", 8)],
)
def test_every_dtype_code(tmp_path: Path, dtype: str, code: int) -> None:
    assert dtype_code(dtype) == code
    reader = IndexedReader(write(tmp_path / "x", [[1, 2], [100]], dtype))
    assert reader.dtype == np.dtype(dtype)
    assert reader.sequence(1).tolist() == [100]
    assert Path(tmp_path / "x.idx").read_bytes()[len(MAGIC) + 8] == code


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=20))
def test_any_documents_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    reader = IndexedReader(write(tmp_path_factory.mktemp("any") / "x", documents))
    assert [reader.sequence(i).tolist() for i in range(len(reader))] == documents


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.array([1]))
        with pytest.raises(ValueError, match="document 1 has ids from 7 to 70000, which uint16 cannot hold"):
            writer.add_document(np.array([7, 70000]))
    assert IndexedReader(tmp_path / "x").sequence(0).tolist() == [1]


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with IndexedWriter(tmp_path / "y", np.uint16) as writer:
            writer.add_document(np.array([1]))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of uint8, .* got complex128"):
        dtype_code(complex)
    with (
        IndexedWriter(tmp_path / "x", np.uint16) as writer,
        pytest.raises(ValueError, match=r"must be \[T\], got shape"),
    ):
        writer.add_document(np.zeros((2, 2), np.uint16))


def patch(path: Path, at: int, raw: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:at] + raw + old[at + len(raw) :])


@pytest.mark.parametrize(
    ("at", "raw", "message"),
    [
        (0, b"MMIDIDX\x00\x01", "must begin with b'MMIDIDX"),
        (9, struct.pack("<Q", 2), "has version 2, only 1 can be read"),
        (17, b"\x09", r"dtype code must be one of \[1, 2, 3, 4, 5, 6, 7, 8\].*got 9"),
        (17, b"\x05", "the .bin has 18 bytes, no multiple of 8"),
        (
            18,
            struct.pack("<Q", 5),
            "must have 134 bytes for 5 sequences and 5 document entries, got 122; it is truncated",
        ),
        (18, struct.pack("<Q", 2**60), "it is truncated"),
        (26, struct.pack("<Q", 4), "must have 114 bytes .* it is too long"),
        (HEAD, struct.pack("<i", -5), "sizes must be at least 0, but sequence 0 has -5"),
        (HEAD + 12, struct.pack("<i", 4), "must end inside the .bin's 18 bytes, but sequence 3 has 20"),
        (HEAD + 16, struct.pack("<q", -2), "pointers must be multiples of 2, but sequence 0 has -2"),
        (HEAD + 24, struct.pack("<q", 3), "pointers must be multiples of 2, but sequence 1 has 3"),
        (HEAD + 40, struct.pack("<q", 2**40), "must end inside the .bin's 18 bytes, but sequence 3"),
        (HEAD + 48, struct.pack("<q", 1), "document index must ascend from 0"),
        (HEAD + 56, struct.pack("<q", 3), "document index must ascend from 0"),
        (HEAD + 80, struct.pack("<q", 5), "document index must ascend from 0 to the number of sequences, 4"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, at: int, raw: bytes, message: str) -> None:
    write(tmp_path / "x", DOCUMENTS)
    patch(tmp_path / "x.idx", at, raw)
    with pytest.raises(ValueError, match=message):
        IndexedReader(tmp_path / "x")


@pytest.mark.parametrize("length", range(0, HEAD + 88, 7))
def test_index_truncated_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    write(tmp_path / "x", DOCUMENTS)
    idx = tmp_path / "x.idx"
    idx.write_bytes(idx.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"truncated|must begin with"):
        IndexedReader(tmp_path / "x")


def test_truncated_or_missing_tokens_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    tokens = tmp_path / "x.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"end inside the .bin's 16 bytes, but sequence 3 has 18; a file is truncated"):
        IndexedReader(tmp_path / "x")
    tokens.unlink()
    with pytest.raises(ValueError, match=r"x\.bin is missing"):
        IndexedReader(tmp_path / "x")


@pytest.mark.filterwarnings("ignore")
def test_megatron_core_reads_and_writes_the_same(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    write(tmp_path / "ours", DOCUMENTS)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(np.array(document, np.uint16), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"theirs.{suffix}").read_bytes() == (tmp_path / f"ours.{suffix}").read_bytes()
