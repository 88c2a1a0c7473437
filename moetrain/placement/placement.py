"""Where the experts of one MoE layer live: who owns, who holds, and who serves whom.

Shapes: E experts, S slices of a shard, Z seats, G groups, H shards (the etp of the mesh).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.config.errors import require, require_at_least

MAX_SHARES = 1 << 24  # of one source and expert together; ``assign_seats`` multiplies them with counts in 64 bits


class Affinity(NamedTuple):
    """How much more a source's tokens go to near holders: what the weight of a seat is multiplied with.

    Attributes:
        home: for the source's own seat.
        near: for the other seats of its domain.
        far: for all others. Where a source's shares are all zero, weights alone count.
    """

    home: int = 1
    near: int = 1
    far: int = 1


EVEN = Affinity()


@dataclass(frozen=True, eq=False)
class Placement:
    """The placement of ONE MoE layer, as flat int32 arrays on the CPU.

    The expert pool consists of groups: the H ranks that have the shards of the same experts (etp), pool ranks
    ``group * H + shard``. Without shards a group is a rank. A *seat* is (expert, holder): a group that has the whole
    expert and computes with it. Seats ascend by expert, then by holder. An expert's shards are cut into slices; each
    slice has one owner, whose rank of that shard keeps its master and optimizer state. An owner that does not hold the
    expert only stores its slices.

    A source is the group that tokens come from. Its tokens for an expert are split over the expert's seats in
    proportion to their shares; ``shares`` says how these follow from weights and affinity.

    Attributes:
        num_groups: G.
        owner_ES: the group that owns slice s of (each shard of) expert e.
        offset_E1: seats of expert e are ``offset_E1[e] : offset_E1[e + 1]``, at least one.
        holder_Z: the group of each seat.
        weight_Z: of each seat, at least 0; some seat of each expert has more.
        affinity: of sources to holders.
        domain_size: so many consecutive groups are near one another: those of a node.
        num_shards: H.

    Raises:
        ValueError: any of that does not hold.
    """

    num_groups: int
    owner_ES: Tensor
    offset_E1: Tensor
    holder_Z: Tensor
    weight_Z: Tensor
    affinity: Affinity = EVEN
    domain_size: int = 1
    num_shards: int = 1

    @staticmethod
    def of(
        num_groups: int,
        owners: Sequence[Sequence[int]],
        holders: Sequence[Sequence[int]],
        weights: Sequence[Sequence[int]] | None = None,
        *,
        affinity: Affinity = EVEN,
        domain_size: int = 1,
        num_shards: int = 1,
    ) -> "Placement":
        """From lists: the owners of each expert's slices, its holders, and the weights of its seats (1 if left out).

        >>> Placement.of(2, owners=[[0], [1]], holders=[[0, 1], [1]]).holder_Z
        tensor([0, 1, 1], dtype=torch.int32)
        """
        counts = [len(one) for one in holders]
        if weights is not None:
            require(
                [len(one) for one in weights] == counts,
                f"Placement.of: weights must have one for each of the {counts} holders of the experts, "
                f"got {[len(one) for one in weights]}",
            )
        slices = sorted({len(one) for one in owners})
        require(
            len(slices) <= 1,
            f"Placement.of: all experts must have the same number of slices, got {slices}; cut every expert as finely "
            "and give one owner several slices",
        )
        offset_E1 = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        weight_Z = [1] * sum(counts) if weights is None else [weight for one in weights for weight in one]
        return Placement(
            num_groups=num_groups,
            owner_ES=torch.tensor(owners, dtype=torch.int32).view(len(owners), -1),
            offset_E1=offset_E1,
            holder_Z=torch.tensor([rank for one in holders for rank in one], dtype=torch.int32),
            weight_Z=torch.tensor(weight_Z, dtype=torch.int32),
            affinity=affinity,
            domain_size=domain_size,
            num_shards=num_shards,
        )

    def __post_init__(self) -> None:
        require_at_least("placement.num_groups", self.num_groups, 1)
        require_at_least("placement.num_shards", self.num_shards, 1)
        require_at_least("placement.domain_size", self.domain_size, 1)
        self._check_arrays()
        self._check_groups("placement.owner_ES", self.owner_ES)
        self._check_groups("placement.holder_Z", self.holder_Z)
        self._check_seats()
        self._check_weights()

    def _check_arrays(self) -> None:
        for name, dims in (("owner_ES", 2), ("offset_E1", 1), ("holder_Z", 1), ("weight_Z", 1)):
            array: Tensor = getattr(self, name)
            require(
                array.dtype == torch.int32 and array.dim() == dims and array.is_contiguous() and array.is_cpu,
                f"placement.{name} must be a contiguous int32 tensor with {dims} dimension(s) on the CPU, "
                f"got {array.dtype} {list(array.shape)} on {array.device}",
            )
        require(
            self.owner_ES.shape[0] >= 1 and self.owner_ES.shape[1] >= 1,
            f"placement.owner_ES must have at least one expert and one slice, got {list(self.owner_ES.shape)}",
        )
        require(
            self.offset_E1.shape[0] == self.num_experts + 1,
            f"placement.offset_E1 must have one more entry than there are experts ({self.num_experts}), "
            f"got {self.offset_E1.shape[0]}",
        )
        require(
            len(self.holder_Z) == len(self.weight_Z) == int(self.offset_E1[-1]),
            f"placement.holder_Z and weight_Z must have one entry per seat ({int(self.offset_E1[-1])}, where offset_E1 "
            f"ends), got {len(self.holder_Z)} and {len(self.weight_Z)}",
        )

    def _check_groups(self, field: str, group: Tensor) -> None:
        bad = group[(group < 0) | (group >= self.num_groups)]
        require(
            len(bad) == 0,
            f"{field} must be groups below {self.num_groups}, got {bad[:1].tolist()}; the pool has {self.num_groups} "
            f"groups of {self.num_shards} rank(s)",
        )

    def _check_seats(self) -> None:
        count_E = self.offset_E1.diff()
        empty = (count_E < 1).nonzero().flatten().tolist()
        require(
            int(self.offset_E1[0]) == 0 and not empty,
            f"placement.offset_E1 must begin at 0 and give every expert a seat, got {int(self.offset_E1[0])} and none "
            f"for experts {empty[:3]}; every expert needs a holder",
        )
        order_Z = self.expert_Z.long() * self.num_groups + self.holder_Z
        bad = (order_Z.diff() <= 0).nonzero().flatten().tolist()
        if bad:
            expert = int(self.expert_Z[bad[0]])
            raise ValueError(
                f"placement.holder_Z must ascend inside each expert, each holder once, got {self.holders_of(expert)} "
                f"for expert {expert}; sort them and drop repeats"
            )

    def _check_weights(self) -> None:
        require(
            min(self.affinity) >= 0 and max(self.affinity) >= 1,
            f"placement.affinity must be three numbers from 0 on, not all 0, got {tuple(self.affinity)}",
        )
        total_E = torch.zeros(self.num_experts, dtype=torch.int64).index_add_(
            0, self.expert_Z.long(), self.weight_Z.long()
        )
        most = MAX_SHARES // max(self.affinity)
        good_E = (total_E >= 1) & (total_E <= most)
        negative = len(self.weight_Z) > 0 and int(self.weight_Z.min()) < 0
        if negative or not bool(good_E.all()):
            expert = int(self.expert_Z[self.weight_Z.argmin()]) if negative else int(good_E.int().argmin())
            start, stop = self.offset_E1[expert : expert + 2].tolist()
            raise ValueError(
                f"placement.weight_Z must be at least 0 and add up to 1 to {most} (2^24 over the largest affinity) for "
                f"each expert, got {self.weight_Z[start:stop].tolist()} for expert {expert}"
            )

    @property
    def num_experts(self) -> int:
        """E."""
        return self.owner_ES.shape[0]

    @property
    def num_slices(self) -> int:
        """S, slices that each shard of an expert is cut into."""
        return self.owner_ES.shape[1]

    @property
    def num_seats(self) -> int:
        """Z."""
        return self.holder_Z.shape[0]

    @property
    def num_ranks(self) -> int:
        """Ranks of the pool."""
        return self.num_groups * self.num_shards

    @cached_property
    def expert_Z(self) -> Tensor:  # noqa: N802
        """int32, the expert of each seat."""
        expert_E = torch.arange(self.num_experts, dtype=torch.int32)
        return expert_E.repeat_interleave(self.offset_E1.diff().clamp(min=0))

    def holders_of(self, expert: int) -> tuple[int, ...]:
        """The groups that hold ``expert``, ascending."""
        start, stop = self.offset_E1[expert : expert + 2].tolist()
        return tuple(self.holder_Z[start:stop].tolist())

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Experts (shards of them) that pool rank ``rank`` holds, ascending."""
        return tuple(self.expert_Z[self.holder_Z == rank // self.num_shards].tolist())

    def owned_by(self, rank: int) -> tuple[tuple[int, int], ...]:
        """``(expert, slice)`` of every slice that pool rank ``rank`` owns, ascending; all are of its own shard."""
        return tuple((e, s) for e, s in (self.owner_ES == rank // self.num_shards).nonzero().tolist())

    def shard_of(self, rank: int) -> int:
        """The shard that pool rank ``rank`` has of its experts."""
        return rank % self.num_shards

    def shares(self, source: int) -> Tensor:
        """int32 [Z]: the share of each seat in the tokens that group ``source`` has for the seat's expert.

        Weight times affinity; the weights alone for experts where that is zero everywhere.
        """
        home, near, far = self.affinity
        is_near_Z = self.holder_Z // self.domain_size == source // self.domain_size
        factor_Z = torch.where(is_near_Z, near, far).masked_fill_(self.holder_Z == source, home)
        share_Z = (self.weight_Z * factor_Z).int()
        total_E = torch.zeros(self.num_experts, dtype=torch.int64).index_add_(0, self.expert_Z.long(), share_Z.long())
        return torch.where(total_E[self.expert_Z.long()] > 0, share_Z, self.weight_Z)

    def most_held(self) -> int:
        """Experts that the group with the most of them holds."""
        return int(torch.bincount(self.holder_Z, minlength=self.num_groups).max())

    def seats_hash(self) -> str:
        """A digest that is equal where owners and holders are, whoever serves whom: the same weights are here then."""
        return self._seats_hash

    @cached_property
    def _seats_hash(self) -> str:
        return _digest((self.num_groups, self.num_shards), (self.owner_ES, self.offset_E1, self.holder_Z))

    def content_hash(self) -> str:
        """A digest that is equal exactly where placements are, on any rank and machine."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        numbers = (self.num_groups, self.num_shards, self.domain_size, *self.affinity)
        return _digest(numbers, (self.owner_ES, self.offset_E1, self.holder_Z, self.weight_Z))


def _digest(numbers: tuple[int, ...], arrays: tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256()
    digest.update(torch.tensor((*numbers, *arrays[0].shape)).numpy().tobytes())
    for array in arrays:
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()
