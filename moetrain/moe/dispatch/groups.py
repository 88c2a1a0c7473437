"""The ranks among which rows move, and how what they send is counted. Shapes: R rows, D width, W ranks of a group."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.mesh.collectives import (
    PendingRows,
    exchange_counts,
    gather_rows_of_all,
    start_all_to_all_rows,
    sum_rows_of_all,
)
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter


@dataclass(frozen=True, slots=True, eq=False)
class HopGroup:
    """The ranks among which one hop's all-to-alls move rows.

    Args:
        group: these ranks.
        suffix: of the purposes that traffic is counted under.
        counter: counts what leaves this rank.
    """

    group: ProcessGroup
    suffix: str = ""
    counter: TrafficCounter | None = None

    @property
    def size(self) -> int:
        """W."""
        return self.group.size()

    def start(self, x_RD: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], purpose: str) -> PendingRows:
        """Begin an all-to-all of rows, counted as ``purpose`` and the suffix; see ``start_all_to_all_rows``."""
        return start_all_to_all_rows(
            x_RD, send_counts, recv_counts, self.group, counter=self.counter, purpose=purpose + self.suffix
        )


def has_two_levels(groups: MeshGroups) -> bool:
    """Whether dispatch has two levels: where the mesh asks for them and they differ from one."""
    return groups.mesh.two_level and groups.size("ep_between") > 1 and groups.size("ep_inside") > 1


@dataclass(frozen=True, slots=True, eq=False)
class DispatchGroups:
    """All groups of one dispatcher.

    Args:
        ep: rows are sent to the rank of this group that has the expert.
        etp: the ranks that have the other shards of the same experts, and share the rows that reach one of them; None
            where experts are whole.
        counts: both, etp innermost; the same as ``ep`` where experts are whole.
        between: for two levels, the ranks of ``ep`` in this rank's place on every node; None for one level.
        inside: for two levels, the ranks of ``ep`` on this rank's node. Nodes are outermost in ``ep``.
        counter: counts what leaves this rank: "counts"; "pairs" (metadata), "weights", "dispatch" and "combine" (rows),
            on a second hop with "_inside"; between etp shards "etp_pairs", "etp_weights", "etp_gather" (rows) and
            "etp_sum" (results); gradients under the same names with "_grad".
    """

    ep: ProcessGroup
    etp: ProcessGroup | None
    counts: ProcessGroup
    between: ProcessGroup | None = None
    inside: ProcessGroup | None = None
    counter: TrafficCounter | None = None

    @staticmethod
    def of(groups: MeshGroups, counter: TrafficCounter | None = None) -> "DispatchGroups":
        """Those of a mesh; two levels where the mesh asks for them and they differ from one."""
        two = has_two_levels(groups)
        return DispatchGroups(
            ep=groups.group("ep"),
            etp=groups.group("etp") if groups.size("etp") > 1 else None,
            counts=groups.group("dispatch"),
            between=groups.group("ep_between") if two else None,
            inside=groups.group("ep_inside") if two else None,
            counter=counter,
        )

    @property
    def etp_size(self) -> int:
        """Shards of an expert."""
        return 1 if self.etp is None else self.etp.size()

    @property
    def etp_rank(self) -> int:
        """The shard that this rank has."""
        return 0 if self.etp is None else self.etp.rank()

    def direct_hop(self) -> HopGroup:
        """The only hop of one level."""
        return HopGroup(self.ep, "", self.counter)

    def hop_between(self) -> HopGroup:
        """The first hop of two levels."""
        assert self.between is not None
        return HopGroup(self.between, "", self.counter)

    def hop_inside(self) -> HopGroup:
        """The second hop of two levels."""
        assert self.inside is not None
        return HopGroup(self.inside, "_inside", self.counter)

    def exchange(self, counts_XK: Tensor) -> Tensor:
        """Row x of the result came from rank x of ``counts``, to which row x of ``counts_XK`` went."""
        return exchange_counts(counts_XK, self.counts, counter=self.counter)

    def gather_over_etp(self, x_RD: Tensor, counts: Sequence[int], purpose: str) -> Tensor:
        """The rows of all shards' ranks, ``counts`` of each; just ``x_RD`` where experts are whole."""
        if self.etp is None:
            return x_RD
        return gather_rows_of_all(x_RD, counts, self.etp, counter=self.counter, purpose=purpose)

    def sum_over_etp(self, y_RD: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows of the sum of all shards' results: the reverse of ``gather_over_etp``."""
        if self.etp is None:
            return y_RD
        return sum_rows_of_all(y_RD, counts, self.etp, counter=self.counter)
