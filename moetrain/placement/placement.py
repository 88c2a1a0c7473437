"""Where the experts of one MoE layer live: who owns, who holds, and who serves whom."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from moetrain.config.errors import NotBuiltYetError, require, require_at_least


@dataclass(frozen=True, slots=True)
class Placement:
    """The placement of ONE MoE layer. Ranks are pool ranks (positions in the expert pool), not global ones.

    An expert is cut into slices; each slice has one owner, which keeps its master and optimizer state. A holder has
    the whole expert and computes with it. Holders of a trained layer normally include the owners; an owner that
    does not hold the expert only stores its slices.

    Under expert tensor parallelism an expert has ``num_shards`` shards, each with the same share of its hidden units,
    and a rank holds shard ``rank % num_shards`` of its experts. Slices are those of shard 0, then those of shard 1, ...

    Attributes:
        num_ranks: size of the pool.
        owners: ``[expert][slice]`` -> the rank that owns the slice.
        holders: ``[expert]`` -> the ranks that hold it, ascending, at least one.
        quotas: ``[source rank][expert]`` -> a share for each holder, in the order of ``holders``: non-negative whole
            numbers with a positive sum. The source's tokens for the expert are split in proportion.
        num_shards: the etp of the mesh; neighbouring pool ranks have different shards.

    Raises:
        ValueError: any of that does not hold.
    """

    num_ranks: int
    owners: tuple[tuple[int, ...], ...]
    holders: tuple[tuple[int, ...], ...]
    quotas: tuple[tuple[tuple[int, ...], ...], ...]
    num_shards: int = 1

    def __post_init__(self) -> None:
        require_at_least("placement.num_ranks", self.num_ranks, 1)
        require_at_least("placement.num_shards", self.num_shards, 1)
        require(len(self.owners) >= 1, "placement.owners must name at least one expert, got none")
        require(
            len(self.holders) == len(self.owners),
            f"placement.holders must have one entry per expert ({len(self.owners)}), got {len(self.holders)}",
        )
        for expert, (owners, holders) in enumerate(zip(self.owners, self.holders, strict=True)):
            require(len(owners) >= 1, f"placement.owners[{expert}] must have at least one slice, got none")
            self._check_ranks(f"placement.owners[{expert}]", owners)
            self._check_ranks(f"placement.holders[{expert}]", holders)
            require(
                len(holders) >= 1 and all(a < b for a, b in pairwise(holders)),
                f"placement.holders[{expert}] must be ascending ranks, at least one, each once, got {holders}; "
                "sort them and drop repeats",
            )
            self._check_shards(expert)
        self._check_quotas()

    def _check_shards(self, expert: int) -> None:
        shards = {rank % self.num_shards for rank in self.holders[expert]}
        require(
            len(shards) == self.num_shards,
            f"placement.holders[{expert}] must hold all {self.num_shards} shards, but shards "
            f"{sorted(set(range(self.num_shards)) - shards)} have no holder; rank r holds shard "
            f"r mod {self.num_shards}",
        )
        require(
            len(self.owners[expert]) % self.num_shards == 0,
            f"placement.owners[{expert}] must have as many slices of each of the {self.num_shards} shards, "
            f"got {len(self.owners[expert])} slices; give a multiple of {self.num_shards}",
        )

    def _check_ranks(self, field: str, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            require(
                0 <= rank < self.num_ranks,
                f"{field} must be pool ranks below {self.num_ranks}, got {rank}; the pool has {self.num_ranks} ranks",
            )

    def _check_quotas(self) -> None:
        require(
            len(self.quotas) == self.num_ranks,
            f"placement.quotas must have one row per source rank ({self.num_ranks}), got {len(self.quotas)}",
        )
        distinct = {id(row): source for source, row in enumerate(self.quotas)}  # sources often share one row,
        seen: set[tuple[int, int]] = set()  # and the experts of a row their shares
        for source in distinct.values():
            row = self.quotas[source]
            require(
                len(row) == self.num_experts,
                f"placement.quotas[{source}] must have one entry per expert ({self.num_experts}), got {len(row)}",
            )
            for expert, (shares, holders) in enumerate(zip(row, self.holders, strict=True)):
                if (id(shares), len(holders)) in seen:
                    continue
                seen.add((id(shares), len(holders)))
                require(
                    len(shares) == len(holders) and min(shares) >= 0 and sum(shares) >= 1,
                    f"placement.quotas[{source}][{expert}] must have a non-negative share for each of the "
                    f"{len(holders)} holders and a positive sum, got {shares}; give some holder a share",
                )

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.owners)

    def num_slices(self, expert: int) -> int:
        """Slices that each shard of ``expert`` is cut into."""
        return len(self.owners[expert]) // self.num_shards

    def shard_of(self, expert: int, slice_idx: int) -> int:
        """The shard that a slice belongs to."""
        return slice_idx // self.num_slices(expert)

    def holders_of(self, expert: int, shard: int) -> tuple[int, ...]:
        """The ranks that hold ``shard`` of ``expert``, ascending."""
        return tuple(rank for rank in self.holders[expert] if rank % self.num_shards == shard)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Experts that ``rank`` holds, ascending."""
        return tuple(expert for expert, holders in enumerate(self.holders) if rank in holders)

    def owned_by(self, rank: int) -> tuple[tuple[int, int], ...]:
        """``(expert, slice)`` of every slice that ``rank`` owns, ascending."""
        return tuple(
            (expert, slice_idx)
            for expert, owners in enumerate(self.owners)
            for slice_idx, owner in enumerate(owners)
            if owner == rank
        )

    def destination(self, source: int, expert: int) -> int:
        """The holder that gets all of ``source``'s tokens for ``expert``.

        Raises:
            NotBuiltYetError: several holders have a share.
        """
        shares = self.quotas[source][expert]
        serving = [holder for holder, share in zip(self.holders[expert], shares, strict=True) if share]
        if len(serving) > 1:
            field = f"placement.quotas[{source}][{expert}]"
            raise NotBuiltYetError(field, shares, f"give one holder of expert {expert} all of rank {source}'s tokens")
        return serving[0]

    def content_hash(self) -> str:
        """A digest that is equal exactly where placements are, on any rank and machine."""
        text = json.dumps(
            [self.num_ranks, self.owners, self.holders, self.quotas, self.num_shards], separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()


def one_holder_quotas(experts: Iterable[int], holder_idx: int, num_holders: int) -> tuple[tuple[int, ...], ...]:
    """One source's quotas where, for every expert, the holder at ``holder_idx`` gets all tokens."""
    shares = tuple(int(idx == holder_idx) for idx in range(num_holders))
    return tuple(shares for _ in experts)
