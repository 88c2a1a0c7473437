"""Which rows are sent where: a token goes once to each rank that holds some of its experts.

Shapes: T tokens, E experts, N pairs (capacity), W ranks, e experts held here, e1 = e + 1, P pairs received,
C = min(N, W T) rows at most, K = 2 + the most experts that a rank holds.

One linear pass each on the CPU. On CUDA both are composed of torch operators, which wait for nothing.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.ops.group_pairs import group_pairs
from moetrain.ops.native import OPS


def plan_sends(
    token_N: Tensor,
    offset_E1: Tensor,
    rank_E: Tensor,
    local_E: Tensor,
    bad_1: Tensor,
    *,
    num_tokens: int,
    num_ranks: int,
    max_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rank's side of an exchange of rows. Nothing has a gradient.

    Args:
        token_N: int32, the token of each pair, grouped by expert; the list's tail is ignored.
        offset_E1: int32, where each expert's pairs begin.
        rank_E: int32, the rank (of W) to which each expert's tokens go.
        local_E: int32, the expert's index among those that rank holds.
        bad_1: int32, a flag that goes to every rank with the counts.
        num_tokens: T.
        num_ranks: W.
        max_local: most experts that any rank holds.

    Returns:
        ``token_C`` int32: the token of each row that leaves, by (destination, token); unwritten beyond their number.
        ``pair_N`` int32: pairs by destination, inside one in the order they came; the tail is unwritten.
        ``row_N`` int32: each such pair's row inside its destination's block.
        ``counts_WK`` int64: rows for each destination, the flag, and pairs for each of the destination's experts.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong sizes; on the CPU also offsets, ranks or tokens out of range.
    """
    lists = (token_N, offset_E1, rank_E, local_E, bad_1)
    plan = OPS.plan_sends if token_N.device.type == "cpu" else _composed_sends
    token_C, pair_N, row_N, counts_WK = plan(*lists, num_tokens, num_ranks, max_local)
    return token_C, pair_N, row_N, counts_WK


def plan_receives(row_P: Tensor, counts_WK: Tensor, num_local: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regroup received pairs, which lie by (source, expert), by (expert, source). Nothing has a gradient.

    Args:
        row_P: int32, each pair's row inside its source's block, as ``plan_sends`` gave it there.
        counts_WK: int64, row w is what rank w's ``counts_WK`` said of this rank.
        num_local: e.

    Returns:
        ``pair_P`` int32: each regrouped pair's place in the list that came.
        ``row_P`` int32: its row among all received ones.
        ``offset_e1`` int32: where each local expert's pairs begin.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong sizes; on the CPU also counts that announce another number of pairs.
    """
    plan = OPS.plan_receives if row_P.device.type == "cpu" else _composed_receives
    pair_P, placed_P, offset_e1 = plan(row_P, counts_WK, num_local)
    return pair_P, placed_P, offset_e1


def _composed_sends(
    token_N: Tensor,
    offset_E1: Tensor,
    rank_E: Tensor,
    local_E: Tensor,
    bad_1: Tensor,
    num_tokens: int,
    num_ranks: int,
    max_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_cells = num_ranks * num_tokens
    rank_E1 = functional.pad(rank_E, (0, 1), value=-1)
    index_N = torch.arange(token_N.shape[0], device=token_N.device, dtype=torch.int32)
    expert_N = torch.searchsorted(offset_E1[1:].contiguous(), index_N, right=True)  # E in the tail
    rank_N = rank_E1[expert_N]
    cell_N = torch.where(rank_N >= 0, rank_N.long() * num_tokens + token_N, num_cells)

    hit_X = torch.zeros(num_cells + 1, dtype=torch.int64, device=token_N.device).scatter_(0, cell_N, 1)[:-1]
    position_X = hit_X.cumsum(0) - 1
    rows_W = hit_X.view(num_ranks, num_tokens).sum(1)
    start_W1 = torch.cat((rows_W.new_zeros(1), rows_W.cumsum(0)))  # the tail, rank -1, reads the last entry

    counts_WK = torch.zeros(num_ranks, 2 + max_local, dtype=torch.int64, device=token_N.device)
    counts_WK[:, 0] = rows_W
    counts_WK[:, 1] = bad_1
    place_E = rank_E.long() * counts_WK.shape[1] + 2 + local_E  # experts without pairs may share one
    counts_WK.view(-1).scatter_add_(0, place_E, offset_E1.diff().long())

    capacity = min(token_N.shape[0], num_cells)
    slot_X = torch.where(hit_X > 0, position_X, capacity)  # the last slot takes what is not sent
    token_X = torch.arange(num_tokens, device=token_N.device, dtype=torch.int32).repeat(num_ranks)
    token_C = token_N.new_zeros(capacity + 1).scatter_(0, slot_X, token_X)[:capacity]
    pair_N, _ = group_pairs(rank_N, num_ranks)
    row_N = torch.cat((position_X, position_X.new_zeros(1)))[cell_N] - start_W1[rank_N.long()]
    return token_C, pair_N, row_N.index_select(0, pair_N).int(), counts_WK


def _composed_receives(row_P: Tensor, counts_WK: Tensor, num_local: int) -> tuple[Tensor, Tensor, Tensor]:
    rows_W, pairs_We = counts_WK[:, 0], counts_WK[:, 2 : 2 + num_local]
    cell_X = torch.arange(pairs_We.numel(), dtype=torch.int32, device=row_P.device)
    cell_P = torch.repeat_interleave(cell_X, pairs_We.reshape(-1), output_size=row_P.shape[0])
    source_P = torch.div(cell_P, max(1, num_local), rounding_mode="floor")
    start_W = (rows_W.cumsum(0) - rows_W).int()
    pair_P, offset_e1 = group_pairs(cell_P - source_P * num_local, num_local)
    return pair_P, (row_P + start_W[source_P]).index_select(0, pair_P), offset_e1


@torch.library.register_fake("moetrain::plan_sends")
def _plan_sends_fake(
    token_N: Tensor,
    offset_E1: Tensor,
    rank_E: Tensor,
    local_E: Tensor,
    bad_1: Tensor,
    num_tokens: int,
    num_ranks: int,
    max_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    capacity = torch.sym_min(token_N.shape[0], num_ranks * num_tokens)
    counts_WK = token_N.new_empty(num_ranks, 2 + max_local, dtype=torch.int64)
    return token_N.new_empty(capacity), torch.empty_like(token_N), torch.empty_like(token_N), counts_WK


@torch.library.register_fake("moetrain::plan_receives")
def _plan_receives_fake(row_P: Tensor, counts_WK: Tensor, num_local: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(row_P), torch.empty_like(row_P), row_P.new_empty(num_local + 1)
