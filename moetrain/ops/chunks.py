"""Flat chunks, moved or summed by a table: what sparse collectives pack before they send and sum after.

Shapes: N rows of a table. Offsets and lengths are in elements, counted from a tensor's first one, whatever its shape.

Tables are int64, contiguous, on the operands' device. On the CPU their values are checked; on CUDA they are read by the
kernels alone (one launch for a whole table, nothing waits), and checked where ``MOETRAIN_DEBUG=1``. Nothing here has a
gradient.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moetrain.ops.native import OPS


def chunk_table(rows: Iterable[Sequence[int]], columns: int, device: torch.device | str = "cpu") -> Tensor:
    """A table of chunks: int64 [N, columns], of no rows too.

    Args:
        rows: the rows, of ``columns`` numbers each.
        columns: 3 for copies, 4 for sums.
        device: where the operands live.

    Raises:
        ValueError: a row has another number of columns.
    """
    flat: list[int] = []
    for n, row in enumerate(rows):
        if len(row) != columns:
            raise ValueError(f"chunk_table: row {n} must have {columns} columns, got {len(row)}")
        flat.extend(row)
    return torch.tensor(flat, dtype=torch.int64, device=device).view(-1, columns)


def pack_chunks(source: Tensor, table_N3: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Copy chunks of ``source`` into a new flat tensor, converting them to the type that travels.

    Args:
        source: contiguous, of a compute dtype.
        table_N3: (offset in ``source``, offset in the result, length) of each chunk. Results may not overlap.
        size: elements of the result; those that no chunk covers are unwritten.
        dtype: the compute dtype of the result.

    Returns:
        [size], rounded to the nearest, ties to even.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes; on the CPU also chunks that overlap or lie outside.
    """
    packed: Tensor = OPS.pack_chunks(source, table_N3, size, dtype)
    return packed


def unpack_chunks(target: Tensor, source: Tensor, table_N3: Tensor) -> None:
    """Copy chunks of ``source`` to their places in ``target``, converting them to its type.

    Args:
        target: contiguous, of a compute dtype; what no chunk covers stays as it is.
        source: contiguous, of a compute dtype; shares no memory with ``target``.
        table_N3: (offset in ``source``, offset in ``target``, length) of each chunk. Targets may not overlap.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or shared memory; on the CPU also chunks that overlap or lie outside.
    """
    OPS.unpack_chunks_(target, source, table_N3)


def add_sources(target: Tensor, sources: Sequence[Tensor], table_N4: Tensor) -> None:
    """Write sums of chunks, added in the order of the table, whatever the number of threads.

    Neighbouring rows with one destination and length are the terms of one sum, first to last, in at least float32
    (float64 where a source or the target is), rounded once. What ``target`` held is no term.

    Args:
        target: contiguous, of a compute dtype; what no chunk covers stays as it is.
        sources: 1 to 16 contiguous tensors of one compute dtype; none shares memory with ``target``.
        table_N4: (which source, offset in it, offset in ``target``, length) of each term. Sums may not overlap.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or shared memory; on the CPU also sums that overlap and chunks that lie outside.
    """
    OPS.add_sources_(target, sources, table_N4)


@torch.library.register_fake("moetrain::pack_chunks")
def _pack_chunks_fake(source: Tensor, table_N3: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return source.new_empty(size, dtype=dtype)


@torch.library.register_fake("moetrain::unpack_chunks_")
def _unpack_chunks_fake(target: Tensor, source: Tensor, table_N3: Tensor) -> None:
    return None


@torch.library.register_fake("moetrain::add_sources_")
def _add_sources_fake(target: Tensor, sources: list[Tensor], table_N4: Tensor) -> None:
    return None
