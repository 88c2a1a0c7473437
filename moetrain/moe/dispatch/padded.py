"""Dispatch in messages of fixed size, where capacity bounds an expert's rows: nothing is counted, the host never waits.

Every rank sends every other the same number of rows, weights and pair metadata, padded; how many of them mean
something travels with the metadata and stays on the device. All shapes follow from the configuration, as CUDA graphs
want it, at the price of sending padding.

Shapes: W ranks of a hop's group, B rows and Q pairs in the block for each, e experts held there, T tokens, N pairs
(capacity), X = W (times parts) blocks that arrive, K = Q + the most experts of a rank: what a message says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from moetrain.config.errors import require
from moetrain.mesh.collectives import all_to_all_rows
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.dispatch.destinations import Destinations, DispatchGroups
from moetrain.moe.dispatch.plan import DispatchPlan, Hop, with_other_parts
from moetrain.moe.dispatch.two_level import NodeDestinations
from moetrain.moe.routing import Routing
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
    routings: Sequence[Routing],
    to: Destinations | NodeDestinations,
    groups: DispatchGroups,
    padding: Padding,
    counter: TrafficCounter | None,
) -> list[DispatchPlan]:
    """One hop, or two where ``to`` knows of nodes; see ``plan_direct``. Bad logits are not exchanged.

    Args:
        routings: of each piece, within ``padding.of_piece``.
        to: where experts are reached.
        groups: the ranks among which rows move.
        padding: of the micro-batch.
        counter: counts pair metadata as "pairs", "pairs_inside" and "etp_pairs".
    """
    bounds = padding.of_piece(len(routings))
    return [_plan_piece(routing, to, groups, bounds, counter) for routing in routings]


def _plan_piece(
    routing: Routing,
    to: Destinations | NodeDestinations,
    groups: DispatchGroups,
    bounds: Padding,
    counter: TrafficCounter | None,
) -> DispatchPlan:
    hops: list[Hop] = []
    last = to
    if isinstance(to, NodeDestinations):
        assert groups.between is not None
        num_nodes = groups.between.size()
        sent = _send(routing, to.nodes, groups.between, bounds, "", counter)
        row_P, hop = sent.receive(sent.message_XK, to.nodes.max_local, routing.num_tokens)
        hops.append(hop)
        bounds = Padding(num_nodes * sent.num_rows, num_nodes * bounds.limit)
        routing = Routing(row_P, row_P, hop.offset_E1, routing.token_gid_T2, bounds.num_tokens)
        last = to.inside
    assert isinstance(last, Destinations)
    group = groups.inside if hops else groups.ep
    assert group is not None
    sent = _send(routing, last, group, bounds, "_inside" if hops else "", counter)
    blocks = [group.size()] * groups.num_parts
    row_P, hop = sent.receive(
        with_other_parts(sent.message_XK, blocks, groups, counter), last.num_local, routing.num_tokens
    )
    hops.append(hop)
    part_rows = [group.size() * sent.num_rows] * groups.num_parts
    part_pairs = [group.size() * sent.num_pairs] * groups.num_parts
    return DispatchPlan(tuple(hops), row_P, part_rows, part_pairs, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """Blocks of one hop.

    Args:
        group: of the hop.
        suffix: of its purposes.
        token_R, pair_P: what each row and weight of the blocks is; padding repeats some of them.
        message_XK: int32, received: pairs of each expert here, then each pair's row in its block.
        num_rows: B.
        num_pairs: Q.
    """

    group: ProcessGroup
    suffix: str
    token_R: Tensor
    pair_P: Tensor
    message_XK: Tensor
    num_rows: int
    num_pairs: int

    def receive(self, message_XK: Tensor, num_local: int, num_tokens: int) -> tuple[Tensor, Hop]:
        """The row of each pair, grouped by expert, and the hop."""
        count_Xe, row_XQ = message_XK[:, :num_local], message_XK[:, message_XK.shape[1] - self.num_pairs :]
        end_Xe = count_Xe.cumsum(1).contiguous()
        index_XQ = torch.arange(self.num_pairs, device=row_XQ.device).expand(len(row_XQ), -1).contiguous()
        expert_XQ = torch.searchsorted(end_Xe, index_XQ, right=True)
        expert_XQ = torch.where(expert_XQ < num_local, expert_XQ, -1).int()
        recv_pair_P, offset_e1 = group_pairs(expert_XQ.flatten(), num_local)
        start_X1 = torch.arange(len(row_XQ), device=row_XQ.device, dtype=torch.int32)[:, None] * self.num_rows
        row_P = (row_XQ + start_X1).flatten().index_select(0, recv_pair_P)
        rows, pairs = ([size] * self.group.size() for size in (self.num_rows, self.num_pairs))
        hop = Hop(
            self.group, self.suffix, rows, rows, pairs, pairs,
            self.token_R, self.pair_P, recv_pair_P, offset_e1, max(1, num_tokens or self.num_rows),
        )  # fmt: skip
        return row_P, hop


def _send(
    routing: Routing,
    to: Destinations,
    group: ProcessGroup,
    bounds: Padding,
    suffix: str,
    counter: TrafficCounter | None,
) -> _Blocks:
    """Lay out the blocks of one hop and exchange their metadata."""
    num_ranks = group.size()
    num_pairs = to.max_local * bounds.limit
    num_rows = min(bounds.num_tokens, num_pairs)
    token_C, pair_N, row_N, counts_WK = to.sends(routing, routing.offset_E1.new_zeros(1), num_ranks)
    token_WB, _ = _laid_out(token_C, counts_WK[:, 0], num_rows)
    # Padding is spread over tokens, and over pairs, so that nothing has to add up much of one, even if it is zeros. A
    # rank without any has as many zeros as fit into a block (``Travel``).
    spread_B = torch.arange(num_rows, device=token_C.device, dtype=torch.int32) % max(1, routing.num_tokens or num_rows)
    is_row_WB = torch.arange(num_rows, device=token_C.device) < counts_WK[:, :1]
    token_WB = torch.where(is_row_WB, token_WB, spread_B)
    pairs_W = counts_WK[:, 2:].sum(1)
    pair_WQ, index_WQ = _laid_out(pair_N, pairs_W, num_pairs)
    is_pair_WQ = torch.arange(num_pairs, device=token_C.device) < pairs_W[:, None]
    spread_Q = torch.arange(num_pairs, device=token_C.device, dtype=torch.int32) % max(1, pair_N.shape[0] or num_pairs)
    row_WQ = functional.pad(row_N, (0, 1))[index_WQ]
    message_WK = torch.cat((counts_WK[:, 2:].int(), torch.where(is_pair_WQ, row_WQ, 0)), dim=1)
    even = [1] * num_ranks
    message_WK = all_to_all_rows(message_WK, even, even, group, counter=counter, purpose="pairs" + suffix)
    return _Blocks(
        group,
        suffix,
        token_WB.flatten(),
        torch.where(is_pair_WQ, pair_WQ, spread_Q).flatten(),
        message_WK,
        num_rows,
        num_pairs,
    )


def _laid_out(list_N: Tensor, count_W: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Spread a list of consecutive runs over blocks of ``size``: the entries, and their places; garbage beyond a run.

    Garbage is a place in the list, or its end: an entry that may be read but means nothing.
    """
    start_W1 = (count_W.cumsum(0) - count_W)[:, None]
    index_WB = (start_W1 + torch.arange(size, device=list_N.device)).clamp(max=list_N.shape[0])
    return functional.pad(list_N, (0, 1))[index_WB], index_WB
