"""The matrix products of an expert MLP outside its own kernels, in three ways: "simple", "grouped_mm" and "loop".

Shapes: M pairs (a capacity), R rows, E experts (groups of pairs), S slots (stacked weights), N and K the sides of a
weight matrix, I and J those of a weight gradient. Group e is pairs ``offset_E1[e] : offset_E1[e + 1]`` and uses slot
``slot_E[e]``, or e. Results beyond ``offset_E1[-1]`` are anything. All run on any device.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moetrain.ops.native import OPS

ALIGNED_BYTES = 16
MAX_GROUPED_MM_GROUPS = 1023  # torch refuses more on CUDA


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which pairs use which slot."""

    offset_E1: Tensor
    slot_E: Tensor | None
    num_slots: int


class Products(Protocol):
    """Products over groups of pairs. With ``row_M``, pair m reads row ``row_M[m]`` of the matrix beside it."""

    def rows(self, x: Tensor, row_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the products below shall take for the rows of ``x`` that ``row_M`` names: a matrix and row numbers."""

    def by_rows(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        """``[M, N]``: each pair's row times its slot transposed."""

    def by_columns(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        """``[M, K]``: each pair's row times its slot."""

    def over_pairs(self, a: Tensor, b: Tensor, row_a_M: Tensor | None = None, row_b_M: Tensor | None = None) -> Tensor:
        """``[S, I, J]``: sums of outer products over the pairs of each slot, 0 where there are none."""


def products(name: str, groups: Groups) -> Products:
    """The products of that name.

    Raises:
        ValueError: there is no such name.
    """
    ways: dict[str, type[_SimpleProducts] | type[_GroupedMmProducts] | type[_LoopProducts]] = {
        "grouped_mm": _GroupedMmProducts,
        "simple": _SimpleProducts,
        "loop": _LoopProducts,
    }
    if name not in ways:
        raise ValueError(f"expert_mlp: its products must be one of {', '.join(ways)}, got {name}")
    return ways[name](groups)


@dataclass(frozen=True, slots=True, eq=False)
class _SimpleProducts:
    """By this package's ``grouped_gemm`` operators: any dtype and size, nothing waits for the device."""

    groups: Groups

    def rows(self, x: Tensor, row_M: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, row_M

    def by_rows(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        return OPS.grouped_gemm(a, w_SNK, self.groups.offset_E1, self.groups.slot_E, row_M, False)

    def by_columns(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        return OPS.grouped_gemm(a, w_SNK, self.groups.offset_E1, self.groups.slot_E, row_M, True)

    def over_pairs(self, a: Tensor, b: Tensor, row_a_M: Tensor | None = None, row_b_M: Tensor | None = None) -> Tensor:
        groups = self.groups
        return OPS.grouped_gemm_varlen_k(a, b, groups.offset_E1, groups.slot_E, row_a_M, row_b_M, groups.num_slots)


@dataclass(frozen=True, slots=True, eq=False)
class _GroupedMmProducts:
    """By ``torch._grouped_mm``, as torch 2.11 to 2.13 have it.

    It takes bf16 on compute capability 9.x and 10.x; elsewhere, and for fp16 and fp32, it copies the offsets to the
    host and loops. Addresses and strides must be multiples of 16 bytes, groups at most 1023 and at least 1; groups may
    be empty, in a sum over pairs only where the left side is transposed and the right side is not, as here. There is
    one matrix per group, so slots are copied to their groups, and gradients of shared slots are rounded per group.
    """

    groups: Groups

    def rows(self, x: Tensor, row_M: Tensor) -> tuple[Tensor, Tensor | None]:
        return OPS.gather_rows(x, row_M, self.groups.offset_E1), None

    def by_rows(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        return self._product(a, self._of_groups(w_SNK).mT, row_M)

    def by_columns(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        return self._product(a, self._of_groups(w_SNK), row_M)

    def over_pairs(self, a: Tensor, b: Tensor, row_a_M: Tensor | None = None, row_b_M: Tensor | None = None) -> Tensor:
        groups = self.groups
        a_MI, b_MJ = self._in_place(a, row_a_M), self._in_place(b, row_b_M)
        sum_EIJ = torch._grouped_mm(a_MI.t(), b_MJ, offs=groups.offset_E1[1:])
        if groups.slot_E is None:
            return sum_EIJ
        num_rows = sum_EIJ.shape[1]  # of a slot: as rows of their own they keep a whole GPU busy
        row_I = torch.arange(num_rows, dtype=torch.int32, device=a.device)
        row_M = (groups.slot_E[:, None] * num_rows + row_I).flatten()
        sum_RJ = OPS.scatter_add_rows(sum_EIJ.flatten(0, 1), row_M, None, None, groups.num_slots * num_rows)
        return sum_RJ.unflatten(0, (groups.num_slots, num_rows))

    def _product(self, a: Tensor, b_EKN: Tensor, row_M: Tensor | None) -> Tensor:
        return torch._grouped_mm(self._in_place(a, row_M), b_EKN, offs=self.groups.offset_E1[1:])

    def _in_place(self, a: Tensor, row_M: Tensor | None) -> Tensor:
        return a if row_M is None else OPS.gather_rows(a, row_M, self.groups.offset_E1)

    def _of_groups(self, w_SNK: Tensor) -> Tensor:
        """[E, N, K], aligned."""
        if self.groups.slot_E is not None:
            return w_SNK.index_select(0, self.groups.slot_E)
        fits = is_aligned(w_SNK) and not is_shared(w_SNK)
        return w_SNK if fits else w_SNK.clone(memory_format=torch.contiguous_format)


class _LoopProducts:
    """By ``torch.mm``, one expert after another, for debugging: reads the offsets, so it waits for the device."""

    def __init__(self, groups: Groups) -> None:
        spans = list(pairwise(groups.offset_E1.tolist()))
        slots = range(len(spans)) if groups.slot_E is None else groups.slot_E.tolist()
        self._spans = [(begin, end, slot) for (begin, end), slot in zip(spans, slots, strict=True) if begin < end]
        self._num_slots = groups.num_slots

    def rows(self, x: Tensor, row_M: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, row_M

    def by_rows(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        return self._product(a, w_SNK.mT, row_M)

    def by_columns(self, a: Tensor, w_SNK: Tensor, row_M: Tensor | None = None) -> Tensor:
        return self._product(a, w_SNK, row_M)

    def over_pairs(self, a: Tensor, b: Tensor, row_a_M: Tensor | None = None, row_b_M: Tensor | None = None) -> Tensor:
        sum_SIJ = a.new_zeros(self._num_slots, a.shape[1], b.shape[1])
        for begin, end, slot in self._spans:
            sum_SIJ[slot].addmm_(_span(a, row_a_M, begin, end).t(), _span(b, row_b_M, begin, end))
        return sum_SIJ

    def _product(self, a: Tensor, b_SKN: Tensor, row_M: Tensor | None) -> Tensor:
        c_MN = a.new_empty(a.shape[0] if row_M is None else row_M.shape[0], b_SKN.shape[2])
        for begin, end, slot in self._spans:
            torch.mm(_span(a, row_M, begin, end), b_SKN[slot], out=c_MN[begin:end])
        return c_MN


def _span(a: Tensor, row_M: Tensor | None, begin: int, end: int) -> Tensor:
    return a[begin:end] if row_M is None else a[row_M[begin:end].long()]


def is_aligned(tensor: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, as in a tensor of an allocation of its own."""
    item = tensor.element_size()
    # What is traced has no address; an allocation begins at a multiple.
    address = tensor.storage_offset() * item if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    strides = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
    return all(place % ALIGNED_BYTES == 0 for place in (address, *(stride * item for stride in strides)))


def is_shared(w_SNK: Tensor) -> bool:
    """Whether all slots are one matrix, as after ``expand``."""
    return w_SNK.shape[0] > 1 and w_SNK.stride(0) == 0
