"""Which token goes to which expert, with what weight. Shapes: T tokens, E experts, N pairs (capacity)."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moetrain.ops import gather_rows


@dataclass(frozen=True, slots=True, eq=False)
class PairList:
    """(token, expert) pairs grouped by expert: a routing as planning sees it, without weights.

    Args:
        token_N: int32, the token (on later hops of a dispatch: the row) of each pair; the list's tail is ignored.
        offset_E1: int32, where each expert's pairs begin.
        num_tokens: tokens, or rows, in all.
    """

    token_N: Tensor
    offset_E1: Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """(token, expert, weight) pairs grouped by expert, experts ascending, tokens ascending inside an expert.

    Everything after the router reads this alone, so every way to choose experts has one code path. The list has a
    fixed capacity N; its true length is ``offset_E1[-1]``, on the device, and what lies beyond is ignored.

    Args:
        token_N: int32, the token of each pair, an index into this rank's T tokens.
        weight_N: at least float32, carries the gradient to the router.
        offset_E1: int32, pairs of expert e are ``offset_E1[e] : offset_E1[e + 1]``; experts are global ids.
        token_gid_T2: int64 [T, 2], global id of each token: (sequence, position).
        num_tokens: T.
        limit: no expert has more pairs than this; None where the host knows no limit.
    """

    token_N: Tensor
    weight_N: Tensor
    offset_E1: Tensor
    token_gid_T2: Tensor
    num_tokens: int
    limit: int | None = None

    @property
    def pairs(self) -> PairList:
        """The pairs alone."""
        return PairList(self.token_N, self.offset_E1, self.num_tokens)

    @property
    def capacity(self) -> int:
        """N, the pairs that the list has room for."""
        return self.token_N.shape[0]

    @property
    def num_experts(self) -> int:
        """E, over all ranks."""
        return self.offset_E1.shape[0] - 1

    def validate(self) -> "Routing":
        """Check every promise above and return self. Reads the device, so it is for debugging and tests.

        Raises:
            ValueError: naming the promise that does not hold.
        """
        self._check_types()
        offsets = self.offset_E1.tolist()
        if offsets[0] != 0 or any(a > b for a, b in pairwise(offsets)):
            raise ValueError(f"Routing: offset_E1 must start at 0 and never fall, got {offsets}")
        if offsets[-1] > self.capacity:
            raise ValueError(f"Routing: offset_E1 ends at {offsets[-1]}, beyond the capacity of {self.capacity} pairs")
        most = max(stop - start for start, stop in pairwise(offsets))
        if self.limit is not None and most > self.limit:
            raise ValueError(f"Routing: no expert may have more than {self.limit} pairs, its limit, but one has {most}")
        token_N = self.token_N[: offsets[-1]].long()
        if token_N.numel() and not 0 <= int(token_N.min()) <= int(token_N.max()) < self.num_tokens:
            raise ValueError(
                f"Routing: token_N must lie in [0, {self.num_tokens}), got {int(token_N.min())} to {int(token_N.max())}"
            )
        for expert, (start, stop) in enumerate(pairwise(offsets)):
            if bool((token_N[start:stop].diff() <= 0).any()):
                raise ValueError(f"Routing: tokens of expert {expert} must strictly ascend; group pairs stably")
        if not bool(self.weight_N[: offsets[-1]].isfinite().all()):
            raise ValueError("Routing: weight_N must be finite; check the router's logits")
        return self

    def _check_types(self) -> None:
        for name in ("token_N", "offset_E1"):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or tensor.dim() != 1:
                raise ValueError(f"Routing: {name} must be int32 [N], got {tensor.dtype} {list(tensor.shape)}")
        if self.num_experts < 1:
            raise ValueError("Routing: offset_E1 must have one more entry than there are experts, got none")
        if self.weight_N.shape != self.token_N.shape:
            raise ValueError(
                f"Routing: weight_N {list(self.weight_N.shape)} must be as long as token_N {list(self.token_N.shape)}"
            )
        if torch.promote_types(self.weight_N.dtype, torch.float32) != self.weight_N.dtype:
            raise ValueError(f"Routing: weight_N must be at least float32, got {self.weight_N.dtype}")
        if self.token_gid_T2.dtype != torch.int64 or self.token_gid_T2.shape != (self.num_tokens, 2):
            raise ValueError(
                f"Routing: token_gid_T2 must be int64 [{self.num_tokens}, 2], got {self.token_gid_T2.dtype} "
                f"{list(self.token_gid_T2.shape)}"
            )


@torch.no_grad()
def keep_pairs(stays_N: Tensor, offset_E1: Tensor) -> tuple[Tensor, Tensor]:
    """Shorten a list of pairs without asking the host how many stay.

    Args:
        stays_N: bool, false in the list's tail.
        offset_E1: int32, where each expert's pairs begin.

    Returns:
        ``place_N`` int32, the places of those that stay, in order, then zeros; ``offset_E1`` of the shorter list.
    """
    capacity = stays_N.shape[0]
    through_N = stays_N.cumsum(0)
    place_N = through_N.new_zeros(capacity + 1)
    index_N = torch.arange(capacity, device=stays_N.device)
    place_N.scatter_(0, torch.where(stays_N, through_N - 1, capacity), index_N)
    before_N1 = torch.cat((through_N.new_zeros(1), through_N))
    return place_N[:capacity].int(), before_N1[offset_E1.long()].int()


def take_pairs(routing: Routing, place_N: Tensor, offset_E1: Tensor, limit: int | None) -> Routing:
    """The pairs at ``place_N`` of a routing; ``offset_E1`` and ``limit`` are those of the new list."""
    token_N = routing.token_N.index_select(0, place_N)
    weight_N = gather_rows(routing.weight_N.unsqueeze(1), place_N, offset_E1).squeeze(1)
    return Routing(token_N, weight_N, offset_E1, routing.token_gid_T2, routing.num_tokens, limit)


@torch.no_grad()
def expert_of_pairs(offset_E1: Tensor, capacity: int) -> Tensor:
    """int64 [N]: the expert of each pair, E in the tail."""
    index_N = torch.arange(capacity, device=offset_E1.device, dtype=torch.int32)
    return torch.searchsorted(offset_E1[1:].contiguous(), index_N, right=True)
