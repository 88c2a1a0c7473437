"""The tensors that a call of ``expert_mlp`` works on, as one thing.

Shapes: R rows, D width, F hidden width, N (row, expert) pairs (a capacity), E experts, S slots.
"""

from typing import NamedTuple

from torch import Tensor


class ExpertInputs(NamedTuple):
    """In the order in which the operators take them: ``OPS.expert_mlp(*inputs, activation, save_h)``."""

    x_RD: Tensor
    row_N: Tensor  # int32
    weight_N: Tensor  # at least fp32
    offset_E1: Tensor  # int32
    w_in: Tensor  # [S, 2 or 1, F, D]
    w_out: Tensor  # [S, D, F]
    slot_E: Tensor | None = None  # int32; None: expert e uses slot e
    b_in: Tensor | None = None  # [S, 2 or 1, F]
    b_out: Tensor | None = None  # [S, D]

    @property
    def num_slots(self) -> int:
        """S."""
        return self.w_in.shape[0]

    def have_work(self) -> bool:
        """Whether there may be pairs. Asks no device."""
        return min(self.row_N.shape[0], self.offset_E1.shape[0] - 1, self.x_RD.shape[0]) > 0

    def empty_grads(self) -> tuple[Tensor, ...]:
        """Memory for the gradients of x, weight, w_in, w_out, b_in and b_out; of no size where there is no bias."""
        likes = (self.x_RD, self.weight_N, self.w_in, self.w_out, self.b_in, self.b_out)
        return tuple(self.x_RD.new_empty(0) if like is None else like.new_empty(like.shape) for like in likes)
