"""What one rank computes in one round. Shapes: T tokens of the rank (0 where its lane is empty), P pieces, R rows."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.config.errors import require
from moetrain.sequence.zigzag import Zigzag

LEAST_ROW = 128  # tokens of short documents that attention takes together: less would leave its blocks half empty


class Piece(NamedTuple):
    """Tokens [start, stop) of a sequence, of the document that begins at its token ``first``."""

    sequence: int  # global id
    start: int
    stop: int
    first: int


@dataclass(frozen=True, slots=True)
class GangShare:
    """Sequences that several ranks share in one round; see ``moetrain.sequence.zigzag`` for who has which part."""

    num_tokens: tuple[int, ...]  # of each whole sequence
    ranks: tuple[int, ...]  # of the data group, in the order of the ring
    place: int  # of this rank among them

    def parts(self) -> Zigzag:
        """Who has what."""
        return Zigzag(self.num_tokens, len(self.ranks))


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Documents, or pieces of them, one after another; nothing is padding.

    Attention and positions never cross from one document into another. Without a gang each piece is a whole document
    (or all of it that its sequence has).

    Attributes:
        token_id_T: int64 input tokens.
        target_T: int64 next tokens; -1 where there is no loss.
        pieces: where these are from, in order.
        gang: of the sequences' other parts, where other ranks have them; None where each piece is whole.
        num_loss_tokens: tokens with a target; counted when left out.
    """

    token_id_T: Tensor
    target_T: Tensor
    pieces: tuple[Piece, ...]
    gang: GangShare | None = None
    num_loss_tokens: int = -1

    def __post_init__(self) -> None:
        for name in ("token_id_T", "target_T"):
            value = getattr(self, name)
            require(
                value.dim() == 1 and value.shape == self.token_id_T.shape and value.dtype == torch.int64,
                f"PackedBatch.{name} must be int64 [T], token_id_T and target_T of one length, got {value.dtype} "
                f"{tuple(value.shape)}; token_id_T has shape {tuple(self.token_id_T.shape)}",
            )
        for piece in self.pieces:
            require(
                0 <= piece.first <= piece.start < piece.stop and (self.gang is not None or piece.first == piece.start),
                f"PackedBatch.pieces: a piece must have tokens and, without a gang, begin with its document, got "
                f"{piece}; leave out what is empty, and give the gang of a sequence that is shared",
            )
        held = sum(piece.stop - piece.start for piece in self.pieces)
        require(
            held == self.num_tokens,
            f"PackedBatch.pieces must have the batch's {self.num_tokens} tokens, got {held}; name each token once",
        )
        if self.gang is not None:
            share = self.gang.parts().size(self.gang.place)
            require(
                share == self.num_tokens,
                f"PackedBatch.gang: rank {self.gang.place} of {len(self.gang.ranks)} has {share} tokens of sequences "
                f"of {list(self.gang.num_tokens)}, but the batch has {self.num_tokens}; give the parts of this rank",
            )
        if self.num_loss_tokens < 0:
            object.__setattr__(self, "num_loss_tokens", int((self.target_T >= 0).sum()))

    @staticmethod
    def empty(gang: GangShare | None = None) -> "PackedBatch":
        """A batch of no tokens: an empty lane, or a place in a gang that has none, still runs forward and backward."""
        none_T = torch.empty(0, dtype=torch.int64)
        return PackedBatch(none_T, none_T, (), gang, 0)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_id_T)

    def positions(self) -> Tensor:
        """int64 [T] on the CPU, of each token in its document."""
        place_T, _, first_T = self._by_token()
        return place_T - first_T

    def token_gids(self) -> Tensor:
        """int64 [T, 2] on the CPU: each token's sequence and place in it, the same wherever it is computed."""
        place_T, sequence_T, _ = self._by_token()
        return torch.stack((sequence_T, place_T), dim=-1)

    def offsets(self) -> Tensor:
        """int32 [P + 1] on the CPU: where pieces begin, and T."""
        sizes = [0, *(piece.stop - piece.start for piece in self.pieces)]
        return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def rows(self) -> Tensor:
        """int32 [R + 1] on the CPU: where rows begin, and T; neighbouring documents that attention takes at once.

        A sequence is in one row, and short ones share one.
        """
        offset = self.offsets().tolist()
        begins = [0]
        for idx, (piece, following) in enumerate(pairwise(self.pieces), start=1):
            if following.sequence != piece.sequence and offset[idx] - begins[-1] >= LEAST_ROW:
                begins.append(offset[idx])
        return torch.tensor([*begins, self.num_tokens] if self.num_tokens else [0], dtype=torch.int32)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch with its tokens on ``device``; counts are carried over, so nothing waits for the device."""
        return replace(
            self,
            token_id_T=self.token_id_T.to(device, non_blocking=non_blocking),
            target_T=self.target_T.to(device, non_blocking=non_blocking),
        )

    def _by_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token its place in its sequence, that sequence, and the place where its document begins."""
        piece_P4 = torch.tensor(self.pieces, dtype=torch.int64).view(-1, 4)
        size_P = piece_P4[:, 2] - piece_P4[:, 1]
        behind_P = size_P.cumsum(0) - size_P  # tokens of the pieces before
        of_T3 = torch.repeat_interleave(
            torch.stack((piece_P4[:, 1] - behind_P, piece_P4[:, 0], piece_P4[:, 3]), dim=1), size_P, dim=0
        )
        return of_T3[:, 0] + torch.arange(len(of_T3)), of_T3[:, 1], of_T3[:, 2]
