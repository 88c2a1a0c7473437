"""Who sends which rows to whom, for one layer and micro-batch: indices and splits, no floating-point data.

Shapes: E experts, e experts held here, N pairs (capacity), P pairs sent or received, W ranks of the ep group, X ranks
that counts are exchanged among, K counters for each, R rows sent or received, I pieces of a micro-batch, H shards of
an expert (etp).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.mesh.collectives import PendingRows
from moetrain.moe.dispatch.destinations import SendPlan
from moetrain.moe.dispatch.groups import DispatchGroups, HopGroup
from moetrain.ops import plan_receives


@dataclass(frozen=True, slots=True, eq=False)
class Hop:
    """One all-to-all towards the experts; combining walks it backwards.

    Args:
        group: the ranks among which rows move.
        send_rows, recv_rows: rows to and from each rank of the group.
        send_pairs, recv_pairs: pairs to and from each rank of the group.
        send_token_R: int32, the row (on the first hop: token) that each sent row is; destinations ascending.
        send_pair_P: int32, the pair behind each sent weight: its place in the list before this hop.
        recv_pair_P: int32, puts received weights into the order of the list after this hop, which is grouped by expert.
        offset_E1: int32, where each expert's pairs begin in that list; what lies beyond the last is no pair.
        num_rows: rows (on the first hop: tokens) that this rank has before the hop; at least 1 where rows are padded.
    """

    group: HopGroup
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
        etp_rows, etp_pairs: rows and pairs that reach each rank of the etp group over ep; all of them have all.
        bad_ranks: ranks whose router saw NaN or Inf, by their index in the group that counts were exchanged in; None
            where nothing was exchanged that would tell.
    """

    hops: tuple[Hop, ...]
    row_P: Tensor
    etp_rows: list[int]
    etp_pairs: list[int]
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

    @property
    def num_rows(self) -> int:
        """All of them."""
        return sum(self.rows)

    @property
    def num_pairs(self) -> int:
        """All of them."""
        return sum(self.pairs)


class HostNumbers:
    """Whole numbers copied from the device at once and read in the order they were packed."""

    def __init__(self, packed: list[Tensor]) -> None:
        """``packed``: int64 tensors of any shape, read row by row."""
        self._numbers: list[int] = torch.cat([numbers.flatten() for numbers in packed]).tolist()
        self._read = 0

    def take(self, count: int) -> list[int]:
        """The next ``count`` of them."""
        self._read += count
        return self._numbers[self._read - count : self._read]

    def split(self, size: int) -> Split:
        """The next two times ``size``, as ``rows_and_pairs`` packs them."""
        return Split(self.take(size), self.take(size))


@dataclass(frozen=True, slots=True, eq=False)
class Received:
    """What the exchange of counts says will reach the experts here, whichever of their shards it reaches first.

    Args:
        counts_HWK: int64, what rank w sends to the etp rank h.
        splits: of each etp rank, the same on the host.
        bad_ranks: as in ``DispatchPlan``.
    """

    counts_HWK: Tensor
    splits: list[Split]
    bad_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PendingHop:
    """One hop of a counted plan whose pair metadata is pending.

    Args:
        group: as in ``Hop``.
        sends: what leaves.
        send, recv: rows and pairs to and from each rank of the group.
        num_rows: rows, or tokens, before the hop.
        metadata: the row of each pair in its block.
    """

    group: HopGroup
    sends: SendPlan
    send: Split
    recv: Split
    num_rows: int
    metadata: PendingRows

    @staticmethod
    def start(group: HopGroup, sends: SendPlan, send: Split, recv: Split, num_rows: int) -> "PendingHop":
        """Begin to send the metadata."""
        row_P1 = sends.block_row_N[: send.num_pairs, None]
        return PendingHop(group, sends, send, recv, num_rows, group.start(row_P1, send.pairs, recv.pairs, "pairs"))

    def finish(self, row_P1: Tensor, counts_WK: Tensor, num_experts: int) -> tuple[Tensor, Hop]:
        """The row of each received pair, grouped by expert, and the hop.

        Received pairs lie by (source, expert) and are regrouped by (expert, source). Rank 1 in the example of
        ``Destinations.plan_sends``, which has a token of its own with experts 2 and 3:

            received:        source  0           | 1
                             rows    0  1  2     | 3
                             expert  2  2  3  3  | 2  3
                             row_P1  0  1  1  2  | 0  0     rows inside the source's block

            recv_pair_P      0  1  4  | 2  3  5             place in the list above, expert 2 first
            row_P            0  1  3  | 1  2  3             rows among all received ones
            offset_E1        0  3  6

        Args:
            row_P1: the metadata that came, of all shards of the experts here.
            counts_WK: what each source sends.
            num_experts: on this side of the hop.
        """
        recv_pair_P, row_P, offset_E1 = plan_receives(row_P1.squeeze(1), counts_WK, num_experts)
        hop = Hop(
            group=self.group,
            send_rows=self.send.rows,
            recv_rows=self.recv.rows,
            send_pairs=self.send.pairs,
            recv_pairs=self.recv.pairs,
            send_token_R=self.sends.token_C[: self.send.num_rows],
            send_pair_P=self.sends.pair_N[: self.send.num_pairs],
            recv_pair_P=recv_pair_P,
            offset_E1=offset_E1,
            num_rows=self.num_rows,
        )
        return row_P, hop

    def finish_plan(
        self, received: Received, num_local: int, groups: DispatchGroups, before: tuple[Hop, ...] = ()
    ) -> DispatchPlan:
        """The plan that ends with this hop. Collective over etp.

        Args:
            received: by the experts here.
            num_local: e.
            groups: all of them.
            before: the hops before.
        """
        etp_rows = [split.num_rows for split in received.splits]
        etp_pairs = [split.num_pairs for split in received.splits]
        row_P1 = groups.gather_over_etp(self.metadata.wait(), etp_pairs, "etp_pairs")
        row_P, hop = self.finish(row_P1, received.counts_HWK.flatten(0, 1), num_local)
        return DispatchPlan((*before, hop), row_P, etp_rows, etp_pairs, received.bad_ranks)


def exchange_piece_counts(counts_IWK: list[Tensor], groups: DispatchGroups) -> tuple[Tensor, Tensor]:
    """Exchange the counters of all pieces at once.

    What reaches one shard of an expert reaches all of them, so the ranks of all shards get all counts.

    Args:
        counts_IWK: of each piece, the counters for rank w of the ep group; counter 1 is the flag of bad logits.
        groups: the ranks among which rows move.

    Returns:
        ``recv_IHWK``, of each piece the counters of rank w of etp rank h's ep group, and ``bad_X``, everybody's flag.
    """
    send_XK = torch.cat(counts_IWK, dim=1).repeat_interleave(groups.etp_size, dim=0)
    recv_XK = groups.exchange(send_XK)
    recv_WHIK = recv_XK.view(groups.ep.size(), groups.etp_size, len(counts_IWK), -1)
    return recv_WHIK.permute(2, 1, 0, 3).contiguous(), recv_XK[:, 1]


def rows_and_pairs(counts_WK: Tensor) -> Tensor:
    """[2, W]: rows of each rank, then pairs of each."""
    return torch.stack((counts_WK[:, 0], counts_WK[:, 2:].sum(1)))


def bad_ranks_of(flags: list[int]) -> tuple[int, ...]:
    """The ranks whose flag is set."""
    return tuple(rank for rank, flag in enumerate(flags) if flag)
