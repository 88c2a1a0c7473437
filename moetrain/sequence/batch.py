"""What one rank computes in one round. Shapes: B packed rows (0 where its lane is empty), S tokens per row."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MATRICES = ("token_id_BS", "target_BS", "position_BS", "document_BS")


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of packed documents; attention and positions never cross from one document into the next.

    Attributes:
        token_id_BS: int64 input tokens.
        target_BS: int64 next tokens; -1 where there is no loss.
        position_BS: int64, 0 at the first token of each document's part of a row.
        document_BS: int64 index of the document inside its row, ascending from 0; -1 at padding.
        sequence_id_B: int64 global row ids.
        num_tokens: tokens that are not padding; counted when left out.
        num_loss_tokens: tokens with a target; counted when left out.
    """

    token_id_BS: Tensor
    target_BS: Tensor
    position_BS: Tensor
    document_BS: Tensor
    sequence_id_B: Tensor
    num_tokens: int = -1
    num_loss_tokens: int = -1

    def __post_init__(self) -> None:
        shape_BS = self.token_id_BS.shape
        for name in _MATRICES:
            value = getattr(self, name)
            if value.dim() != 2 or value.shape != shape_BS or value.dtype != torch.int64:
                raise ValueError(
                    f"PackedBatch.{name} must be int64 of one [B, S] shape for all of {', '.join(_MATRICES)}, "
                    f"got {value.dtype} {tuple(value.shape)}; token_id_BS has shape {tuple(shape_BS)}"
                )
        if self.sequence_id_B.shape != shape_BS[:1] or self.sequence_id_B.dtype != torch.int64:
            raise ValueError(
                f"PackedBatch.sequence_id_B must be int64 [B] with B = {shape_BS[0]}, "
                f"got {self.sequence_id_B.dtype} {tuple(self.sequence_id_B.shape)}"
            )
        if self.num_tokens < 0:
            object.__setattr__(self, "num_tokens", int((self.document_BS >= 0).sum()))
        if self.num_loss_tokens < 0:
            object.__setattr__(self, "num_loss_tokens", int((self.target_BS >= 0).sum()))

    @staticmethod
    def empty(seq_len: int) -> "PackedBatch":
        """A batch of no rows of ``seq_len`` tokens: an empty lane still runs forward and backward."""
        none_BS = torch.empty((0, seq_len), dtype=torch.int64)
        return PackedBatch(none_BS, none_BS, none_BS, none_BS, torch.empty(0, dtype=torch.int64), 0, 0)

    @property
    def num_rows(self) -> int:
        """B."""
        return self.token_id_BS.shape[0]

    @property
    def seq_len(self) -> int:
        """S."""
        return self.token_id_BS.shape[1]

    def valid(self) -> Tensor:
        """Bool [B, S], false at padding."""
        return self.document_BS >= 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on ``device``; the counts are carried over, so nothing waits for the device."""
        names = (*_MATRICES, "sequence_id_B")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})
