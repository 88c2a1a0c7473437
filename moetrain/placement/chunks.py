"""How one expert's matrices become equal flat slices. Shapes: D width, F expert hidden width.

The logical vector of an expert is cat(w_in.flatten(), w_out.flatten()); it is cut into equal, padded slices.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moetrain.config.errors import require, require_at_least, require_divides

ALIGN_ELEMS = 128  # 256 bytes of a two-byte type, and a multiple of that for wider ones


class Box(NamedTuple):
    """A box of ``w_in`` or ``w_out`` of a whole expert: where it starts, and its sizes."""

    matrix: Literal["w_in", "w_out"]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def range_as_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, stop) of a flattened tensor as boxes of it: (offset, sizes) of each, in order.

    At most 2 * len(shape) - 1 of them: a part of a row, whole rows, a part of a row, and so on outwards.

    >>> range_as_boxes((3, 4), 2, 9)
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # whole rows
    if first > last:  # inside one row
        rows = [(start // inner, start % inner, (stop - 1) % inner + 1)]
        whole = []
    else:
        rows = [(first - 1, start % inner, inner)] if start % inner else []
        whole = [((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))] if last > first else []
    boxes = [_in_row(row, box) for row, low, high in rows for box in range_as_boxes(shape[1:], low, high)]
    boxes += whole
    if first <= last and stop % inner:
        boxes += [_in_row(last, box) for box in range_as_boxes(shape[1:], 0, stop % inner)]
    return boxes


def _in_row(row: int, box: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (row, *box[0]), (1, *box[1])


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The matrices of one expert: ``w_in`` [2 or 1, F, D] (gate and up, or up alone) and ``w_out`` [D, F]."""

    width: int
    hidden: int
    gated: bool

    def __post_init__(self) -> None:
        require_at_least("expert width", self.width, 1)
        require_at_least("expert hidden width", self.hidden, 1)

    @property
    def w_in_shape(self) -> tuple[int, int, int]:
        """[2 or 1, F, D]."""
        return (2 if self.gated else 1, self.hidden, self.width)

    @property
    def w_out_shape(self) -> tuple[int, int]:
        """[D, F]."""
        return (self.width, self.hidden)

    @property
    def w_in_numel(self) -> int:
        """Elements of ``w_in``; ``w_out`` starts there in the logical vector."""
        return (2 if self.gated else 1) * self.hidden * self.width

    @property
    def num_parameters(self) -> int:
        """Elements of one expert."""
        return self.w_in_numel + self.hidden * self.width

    def shard(self, num_shards: int) -> "ExpertShape":
        """The shape of one of ``num_shards`` shards: the same width, a share of the hidden units.

        Raises:
            ValueError: the hidden units do not divide.
        """
        require_divides("the number of shards", num_shards, "an expert's hidden width", self.hidden)
        return ExpertShape(self.width, self.hidden // num_shards, self.gated)

    def indices_of_shard(self, shard: int, num_shards: int, start: int, stop: int) -> Tensor:
        """int64: where elements [start, stop) of a shard's own logical vector lie in the whole expert's."""
        mine = self.shard(num_shards)
        index_N = torch.arange(start, stop)
        if num_shards == 1:
            return index_N
        first = shard * mine.hidden
        row_N, column_N = index_N.div(self.width, rounding_mode="floor"), index_N % self.width
        gate_N, unit_N = row_N.div(mine.hidden, rounding_mode="floor"), row_N % mine.hidden
        in_N = (gate_N * self.hidden + first + unit_N) * self.width + column_N
        out_N = index_N - mine.w_in_numel
        out_N = self.w_in_numel + out_N.div(mine.hidden, rounding_mode="floor") * self.hidden + first
        out_N = out_N + (index_N - mine.w_in_numel) % mine.hidden
        return torch.where(index_N < mine.w_in_numel, in_N, out_N)

    def boxes_of_shard(self, shard: int, num_shards: int, start: int, stop: int) -> list[Box]:
        """Elements [start, stop) of a shard's own logical vector as boxes of the whole expert's matrices, in order."""
        mine = self.shard(num_shards)
        first = shard * mine.hidden
        middle = min(max(start, mine.w_in_numel), stop)
        cuts_in = range_as_boxes(mine.w_in_shape, start, middle)
        cuts_out = range_as_boxes(mine.w_out_shape, middle - mine.w_in_numel, stop - mine.w_in_numel)
        return [
            *(Box("w_in", (gate, first + unit, column), size) for (gate, unit, column), size in cuts_in),
            *(Box("w_out", (row, first + unit), size) for (row, unit), size in cuts_out),
        ]

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """View logical vectors ``[..., at least num_parameters]`` as ``w_in [..., 2|1, F, D]``, ``w_out [..., D, F]``.

        What follows the parameters (padding) is left out.

        Raises:
            ValueError: the vectors are too short.
        """
        require(
            flat.shape[-1] >= self.num_parameters,
            f"an expert of width {self.width} and hidden width {self.hidden} has {self.num_parameters} parameters, "
            f"got a vector of {flat.shape[-1]}",
        )
        w_in = flat[..., : self.w_in_numel].unflatten(-1, self.w_in_shape)
        w_out = flat[..., self.w_in_numel : self.num_parameters].unflatten(-1, self.w_out_shape)
        return w_in, w_out


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """An expert, or a shard of one, as ``num_slices`` slices of ``slice_elems`` elements; the last may be short."""

    shape: ExpertShape
    num_slices: int

    def __post_init__(self) -> None:
        require_at_least("num_slices", self.num_slices, 1)

    @property
    def slice_elems(self) -> int:
        """Elements of every slice, padding included: a multiple of 128, so that slices start 256-byte-aligned."""
        fair = -(-self.shape.num_parameters // self.num_slices)
        return -(-fair // ALIGN_ELEMS) * ALIGN_ELEMS

    @property
    def expert_elems(self) -> int:
        """Elements of all slices together, padding included."""
        return self.num_slices * self.slice_elems

    def slice_range(self, slice_idx: int) -> tuple[int, int]:
        """The range [start, stop) of the logical vector that a slice carries; empty where all of it is padding.

        Raises:
            ValueError: there is no such slice.
        """
        require(
            0 <= slice_idx < self.num_slices,
            f"slice must be between 0 and {self.num_slices - 1}, got {slice_idx}; there are {self.num_slices} slices",
        )
        total = self.shape.num_parameters
        return min(slice_idx * self.slice_elems, total), min((slice_idx + 1) * self.slice_elems, total)
