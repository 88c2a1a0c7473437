"""Who sends which rows to whom, for one layer and micro-batch: indices and splits, no floating-point data.

Shapes: E experts, e experts held here, N pairs (capacity), P pairs sent or received, W ranks of the ep group, X ranks
that counts are exchanged among, K counters for each, R rows sent or received (C their capacity), I pieces of a
micro-batch, H parts of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.mesh.collectives import RowsUnderWay, exchange_counts, gather_rows_of_all, start_all_to_all_rows
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.dispatch.destinations import DispatchGroups
from moetrain.ops import plan_receives


@dataclass(frozen=True, slots=True, eq=False)
class Hop:
    """One all-to-all on the way to the experts, walked backwards on the way home.

    Args:
        group: the ranks among which rows move.
        suffix: of the purposes that traffic is counted under.
        send_rows, recv_rows: rows to and from each rank of the group.
        send_pairs, recv_pairs: pairs to and from each rank of the group.
        send_token_R: int32, the row (on the first hop: token) that each sent row is; destinations ascending.
        send_pair_P: int32, the pair behind each sent weight: its place in the list before this hop.
        recv_pair_P: int32, puts received weights into the order of the list after this hop, which is grouped by expert.
        offset_E1: int32, where each expert's pairs begin in that list; what lies beyond the last is no pair.
        num_rows: rows (on the first hop: tokens) that this rank has before the hop; at least 1 where rows are padded.
    """

    group: ProcessGroup
    suffix: str
    send_rows: list[int]
    recv_rows: list[int]
    send_pairs: list[int]
    recv_pairs: list[int]
    send_token_R: Tensor
    send_pair_P: Tensor
    recv_pair_P: Tensor
    offset_E1: Tensor
    num_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class DispatchPlan:
    """Splits on the host, indices on the device, of one piece of a micro-batch.

    Args:
        hops: one, or two where rows go to a node first.
        row_P: int32, the received row of each pair, grouped by local expert.
        part_rows, part_pairs: rows and pairs that reach each rank of the etp group over ep; all of them have all.
        bad_ranks: ranks whose router saw NaN or Inf, by their index in the group that counts were exchanged in; None
            where nothing was exchanged that would tell.
    """

    hops: tuple[Hop, ...]
    row_P: Tensor
    part_rows: list[int]
    part_pairs: list[int]
    bad_ranks: tuple[int, ...] | None

    @property
    def offset_e1(self) -> Tensor:
        """Where each local expert's pairs begin."""
        return self.hops[-1].offset_E1


@dataclass(frozen=True, slots=True)
class Split:
    """Rows and pairs to, or from, each rank of a group."""

    rows: list[int]
    pairs: list[int]


class HostNumbers:
    """Whole numbers brought from the device in one copy and read in the order they were packed."""

    def __init__(self, parts: list[Tensor]) -> None:
        """``parts``: int64 tensors of any shape, read row by row."""
        self._numbers: list[int] = torch.cat([part.flatten() for part in parts]).tolist()
        self._read = 0

    def take(self, count: int) -> list[int]:
        """The next ``count`` of them."""
        self._read += count
        return self._numbers[self._read - count : self._read]

    def split(self, size: int) -> Split:
        """The next two times ``size``, as ``rows_and_pairs`` packs them."""
        return Split(self.take(size), self.take(size))


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One hop of a counted plan whose pair metadata is under way.

    Args:
        group, suffix: as in ``Hop``.
        sent: what ``plan_sends`` gave.
        away, here: rows and pairs to and from each rank of the group.
        num_rows: rows, or tokens, before the hop.
        metadata: the row of each pair in its block.
    """

    group: ProcessGroup
    suffix: str
    sent: tuple[Tensor, Tensor, Tensor, Tensor]
    away: Split
    here: Split
    num_rows: int
    metadata: RowsUnderWay

    @staticmethod
    def start(
        group: ProcessGroup,
        suffix: str,
        sent: tuple[Tensor, Tensor, Tensor, Tensor],
        away: Split,
        here: Split,
        num_rows: int,
        counter: TrafficCounter | None,
    ) -> "Step":
        """Begin to send the metadata."""
        row_P1 = sent[2][: sum(away.pairs), None]
        purpose = "pairs" + suffix
        metadata = start_all_to_all_rows(row_P1, away.pairs, here.pairs, group, counter=counter, purpose=purpose)
        return Step(group, suffix, sent, away, here, num_rows, metadata)

    def finish(self, row_P1: Tensor, counts_WK: Tensor, num_experts: int) -> tuple[Tensor, Hop]:
        """The row of each pair that came, grouped by expert, and the hop."""
        token_C, pair_N, _, _ = self.sent
        recv_pair_P, row_P, offset_e1 = plan_receives(row_P1.squeeze(1), counts_WK, num_experts)
        hop = Hop(
            group=self.group,
            suffix=self.suffix,
            send_rows=self.away.rows,
            recv_rows=self.here.rows,
            send_pairs=self.away.pairs,
            recv_pairs=self.here.pairs,
            send_token_R=token_C[: sum(self.away.rows)],
            send_pair_P=pair_N[: sum(self.away.pairs)],
            recv_pair_P=recv_pair_P,
            offset_E1=offset_e1,
            num_rows=self.num_rows,
        )
        return row_P, hop

    def last(
        self,
        counts_WK: Tensor,
        reaching: list[Split],
        num_local: int,
        groups: DispatchGroups,
        bad_ranks: tuple[int, ...],
        before: tuple[Hop, ...],
        counter: TrafficCounter | None,
    ) -> DispatchPlan:
        """The plan that ends with this hop.

        Args:
            counts_WK: of each rank that sends to any part of the experts here.
            reaching: what each part gets.
            num_local: e.
            groups: all of them.
            bad_ranks: as in ``DispatchPlan``.
            before: the hops before.
            counter: counts what parts tell each other.
        """
        part_rows = [sum(split.rows) for split in reaching]
        part_pairs = [sum(split.pairs) for split in reaching]
        row_P1 = with_other_parts(self.metadata.wait(), part_pairs, groups, counter)
        row_P, hop = self.finish(row_P1, counts_WK, num_local)
        return DispatchPlan((*before, hop), row_P, part_rows, part_pairs, bad_ranks)


def tell(counts_IWK: list[Tensor], groups: DispatchGroups, counter: TrafficCounter | None) -> tuple[Tensor, Tensor]:
    """Exchange the counters of all pieces at once.

    What reaches any part of an expert reaches all of them, so each part is told of all.

    Args:
        counts_IWK: of each piece, what rank w of the ep group is to know; counter 1 is the flag of bad logits.
        groups: the ranks among which rows move.
        counter: counts them as "counts".

    Returns:
        ``told_IHWK``, what rank w of part h's ep group said of each piece, and ``bad_X``, everybody's flag.
    """
    num_ranks, num_parts = groups.ep.size(), groups.num_parts
    sent_XK = torch.cat(counts_IWK, dim=1).repeat_interleave(num_parts, dim=0)
    told_XK = exchange_counts(sent_XK, groups.counts, counter=counter)
    told_WHIK = told_XK.view(num_ranks, num_parts, len(counts_IWK), -1)
    return told_WHIK.permute(2, 1, 0, 3).contiguous(), told_XK[:, 1]


def rows_and_pairs(counts_WK: Tensor) -> Tensor:
    """[2, W]: rows of each rank, then pairs of each."""
    return torch.stack((counts_WK[:, 0], counts_WK[:, 2:].sum(1)))


def with_other_parts(
    row_P1: Tensor, part_pairs: list[int], groups: DispatchGroups, counter: TrafficCounter | None
) -> Tensor:
    """Pair metadata of all parts of the experts here, in the order of parts."""
    if groups.parts is None:
        return row_P1
    return gather_rows_of_all(row_P1, part_pairs, groups.parts, counter=counter, purpose="etp_pairs")
