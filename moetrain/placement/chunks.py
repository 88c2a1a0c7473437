"""How one expert's matrices become equal flat slices. Shapes: D width, F expert hidden width.

The logical vector of an expert is cat(w_in.flatten(), w_out.flatten()); it is cut into equal, padded slices.
"""

from dataclasses import dataclass

from torch import Tensor

from moetrain.config.errors import require, require_at_least

ALIGN_ELEMS = 128  # 256 bytes of a two-byte type, and a multiple of that for wider ones


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
    """An expert cut into ``num_slices`` slices of ``slice_elems`` elements; the last may be short or empty."""

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
        """The part [start, stop) of the logical vector that a slice carries; empty where all of it is padding.

        Raises:
            ValueError: there is no such slice.
        """
        require(
            0 <= slice_idx < self.num_slices,
            f"slice must be between 0 and {self.num_slices - 1}, got {slice_idx}; there are {self.num_slices} slices",
        )
        total = self.shape.num_parameters
        return min(slice_idx * self.slice_elems, total), min((slice_idx + 1) * self.slice_elems, total)
