"""Dispatch in messages of fixed size, where capacity bounds an expert's rows: nothing is counted, the host never waits.

Every rank sends every other the same number of rows, weights and pair metadata, padded; how many of them mean
something is sent with the metadata and stays on the device. All shapes follow from the configuration, as CUDA graphs
want it, at the price of sending padding.

The example of ``Destinations.plan_sends`` (three tokens on rank 0, experts 0, 1 on rank 0 and 2, 3 on rank 1) with at
most T = 3 tokens on a rank, of which an expert takes 2. A block then has room for Q = 2 x 2 pairs and B = min(3, Q)
rows; ``.`` is padding, which repeats some token or pair and means nothing:

    block for     rows (tokens)    weights (places)    message: pairs of each expert, then each pair's row
    rank 0        0 2 .            0 1 . .             1 1 | 0 1 . .
    rank 1        0 1 2            2 3 4 5             2 2 | 0 1 1 2

Shapes: W ranks of a hop's group, B rows and Q pairs in the block for each, e experts held there, T tokens, N pairs
(capacity), X = W (times etp) blocks received, K = Q + the most experts of a rank: the length of a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.config.errors import require
from moetrain.moe.dispatch.destinations import Destinations
from moetrain.moe.dispatch.groups import DispatchGroups, HopGroup
from moetrain.moe.dispatch.plan import DispatchPlan, Hop
from moetrain.moe.dispatch.seats import NodeDestinations
from moetrain.moe.routing import PairList, Routing
from moetrain.ops import group_pairs


@dataclass(frozen=True, slots=True)
class Padding:
    """What bounds the messages, equal on all ranks.

    Args:
        num_tokens: the most tokens that a rank has in a micro-batch.
        limit: the most pairs that an expert takes of one rank.
    """

    num_tokens: int
    limit: int

    def of_piece(self, num_pieces: int) -> "Padding":
        """The bounds for one of so many pieces of a micro-batch."""
        most = -(-self.num_tokens // num_pieces)
        return Padding(most, min(self.limit, most))

    def check(self, routing: Routing) -> None:
        """Refuse a routing that does not fit, before anything is sent.

        Raises:
            ValueError: too many tokens, or no promise that experts take few enough. Whether the promise is kept is for
                ``Routing.validate`` to see: pairs beyond the limit would be lost.
        """
        require(
            routing.limit is not None and routing.limit <= self.limit and routing.num_tokens <= self.num_tokens,
            f"padded dispatch: messages are made for at most {self.num_tokens} tokens and {self.limit} pairs of an "
            f"expert, got {routing.num_tokens} tokens and a limit of {routing.limit}; use micro-batches of "
            "data.micro_batch x data.seq_len tokens, or set dispatch.pad_to_capacity to false",
        )


@torch.no_grad()
def plan_padded(
    routings: Sequence[Routing], to: Destinations | NodeDestinations, groups: DispatchGroups, padding: Padding
) -> list[DispatchPlan]:
    """One hop, or two where ``to`` knows of nodes; see ``plan_direct``. Bad logits are not exchanged.

    Args:
        routings: of each piece, within ``padding.of_piece``.
        to: where experts are.
        groups: the ranks among which rows move.
        padding: of the micro-batch.
    """
    bounds = padding.of_piece(len(routings))
    return [_plan_piece(routing.pairs, to, groups, bounds) for routing in routings]


def _plan_piece(
    pairs: PairList, to: Destinations | NodeDestinations, groups: DispatchGroups, bounds: Padding
) -> DispatchPlan:
    if isinstance(to, Destinations):
        return _last_hop(pairs, to, groups, groups.direct_hop(), bounds)
    between = groups.hop_between()
    blocks = _Blocks.exchange(pairs, to.nodes, between, bounds)
    row_P, hop = blocks.receive(blocks.message_XK, to.nodes.max_local, pairs.num_tokens)
    # What one expert may get on the second hop is what all nodes may have sent for it on the first.
    bounds = Padding(between.size * blocks.num_rows, between.size * bounds.limit)
    forwarded = PairList(row_P, hop.offset_E1, bounds.num_tokens)
    return _last_hop(forwarded, to.inside, groups, groups.hop_inside(), bounds, (hop,))


def _last_hop(
    pairs: PairList,
    to: Destinations,
    groups: DispatchGroups,
    group: HopGroup,
    bounds: Padding,
    before: tuple[Hop, ...] = (),
) -> DispatchPlan:
    """The hop to the ranks that have the experts, and the plan that ends with it."""
    blocks = _Blocks.exchange(pairs, to, group, bounds)
    message_XK = groups.gather_over_etp(blocks.message_XK, [group.size] * groups.etp_size, "etp_pairs")
    row_P, hop = blocks.receive(message_XK, to.num_local, pairs.num_tokens)
    etp_rows = [group.size * blocks.num_rows] * groups.etp_size
    etp_pairs = [group.size * blocks.num_pairs] * groups.etp_size
    return DispatchPlan((*before, hop), row_P, etp_rows, etp_pairs, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """Blocks of one hop.

    Args:
        group: of the hop.
        token_R, pair_P: what each row and weight of the blocks is; padding repeats some of them.
        message_XK: int32, received: pairs of each expert here, then each pair's row in its block.
        num_rows: B.
        num_pairs: Q.
    """

    group: HopGroup
    token_R: Tensor
    pair_P: Tensor
    message_XK: Tensor
    num_rows: int
    num_pairs: int

    @staticmethod
    def exchange(pairs: PairList, to: Destinations, group: HopGroup, bounds: Padding) -> "_Blocks":
        """Lay out the blocks of one hop and exchange their metadata. Collective."""
        num_pairs = to.max_local * bounds.limit
        num_rows = min(bounds.num_tokens, num_pairs)
        token_C, pair_N, row_N, counts_WK = to.plan_sends(pairs, pairs.offset_E1.new_zeros(1))
        pairs_W = counts_WK[:, 2:].sum(1)
        # Padding is spread over tokens, and over pairs, so that nothing has to add up much of one, even if it is zeros.
        # A rank without any has as many zeros as fit into a block (``PlannedPiece``).
        token_WB, is_row_WB, _ = _lay_out(token_C, counts_WK[:, 0], num_rows)
        token_WB = torch.where(is_row_WB, token_WB, _spread(num_rows, pairs.num_tokens, token_C))
        pair_WQ, is_pair_WQ, index_WQ = _lay_out(pair_N, pairs_W, num_pairs)
        pair_WQ = torch.where(is_pair_WQ, pair_WQ, _spread(num_pairs, pair_N.shape[0], token_C))
        row_WQ = torch.where(is_pair_WQ, functional.pad(row_N, (0, 1))[index_WQ], 0)
        message_WK = torch.cat((counts_WK[:, 2:].int(), row_WQ), dim=1)
        one_each = [1] * group.size
        message_XK = group.start(message_WK, one_each, one_each, "pairs").wait()
        return _Blocks(group, token_WB.flatten(), pair_WQ.flatten(), message_XK, num_rows, num_pairs)

    def receive(self, message_XK: Tensor, num_local: int, num_tokens: int) -> tuple[Tensor, Hop]:
        """The row of each pair, grouped by expert, and the hop.

        Args:
            message_XK: of all shards of the experts here.
            num_local: e.
            num_tokens: before the hop.
        """
        count_Xe, row_XQ = message_XK[:, :num_local], message_XK[:, message_XK.shape[1] - self.num_pairs :]
        end_Xe = count_Xe.cumsum(1).contiguous()
        index_XQ = torch.arange(self.num_pairs, device=row_XQ.device).expand(len(row_XQ), -1).contiguous()
        expert_XQ = torch.searchsorted(end_Xe, index_XQ, right=True)
        expert_XQ = torch.where(expert_XQ < num_local, expert_XQ, -1).int()
        recv_pair_P, offset_e1 = group_pairs(expert_XQ.flatten(), num_local)
        start_X1 = torch.arange(len(row_XQ), device=row_XQ.device, dtype=torch.int32)[:, None] * self.num_rows
        row_P = (row_XQ + start_X1).flatten().index_select(0, recv_pair_P)
        rows, pairs = ([size] * self.group.size for size in (self.num_rows, self.num_pairs))
        hop = Hop(
            self.group, rows, rows, pairs, pairs,
            self.token_R, self.pair_P, recv_pair_P, offset_e1, max(1, num_tokens or self.num_rows),
        )  # fmt: skip
        return row_P, hop


def _lay_out(list_N: Tensor, count_W: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spread a list of consecutive runs over blocks of ``size``: entries, whether they mean something, their places.

    What means nothing is some place in the list, or its end: an entry that may be read.
    """
    index_B = torch.arange(size, device=list_N.device)
    start_W1 = (count_W.cumsum(0) - count_W)[:, None]
    index_WB = (start_W1 + index_B).clamp(max=list_N.shape[0])
    return functional.pad(list_N, (0, 1))[index_WB], index_B < count_W[:, None], index_WB


def _spread(size: int, count: int, like: Tensor) -> Tensor:
    """int32 [size]: 0, 1, ... and over again after ``count``; never over where there is nothing to repeat."""
    return torch.arange(size, device=like.device, dtype=torch.int32) % max(1, count or size)
