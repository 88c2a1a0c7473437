"""Give each (token, expert) pair one of the expert's seats, so that balance holds and few rows leave.

A seat is (expert, holder). Quotas, a source's numbers of pairs for each seat, follow from shares; inside them a token's
experts go to few holders: a row leaves once for each. Spreading pairs, not tokens, over replicas costs about a sixth
more rows at the same balance.

Shapes: N pairs (capacity), E experts, E1 = E + 1, Z seats, Z1 = Z + 1, G groups of ranks.
"""

import torch
from torch import Tensor

from moetrain.ops.native import OPS


def assign_seats(
    token_N: Tensor,
    offset_E1: Tensor,
    seat_offset_E1: Tensor,
    holder_Z: Tensor,
    share_Z: Tensor,
    *,
    num_tokens: int,
    num_groups: int,
    source: int,
    domain_size: int,
) -> tuple[Tensor, Tensor]:
    """Refine pairs grouped by expert to pairs grouped by seat. Nothing has a gradient.

    An expert's n pairs are divided over its seats in proportion to their shares, each seat getting the whole number
    below or above. The tokens are cut into blocks of 256, each with about its proportion of every seat. In a block
    tokens are served in order: first whatever the source itself holds; then, over and over, the holder with seats for
    most of the token's remaining experts, in its own domain if two are equal, and then the lower one. Shares that add
    up to n are the very numbers of pairs.

    Args:
        token_N: int32, the token of each pair, grouped by expert and ascending inside one; the list's tail is ignored.
        offset_E1: int32, where each expert's pairs begin.
        seat_offset_E1: int32, where each expert's seats begin.
        holder_Z: int32, the group of each seat, ascending inside an expert.
        share_Z: int32, at least 0; those of an expert add up to at most 2^24, and to 1 or more where it has pairs.
        num_tokens: T, at most 2^22.
        num_groups: G.
        source: the group that the tokens are on.
        domain_size: so many consecutive groups are near one another.

    Returns:
        ``pair_N`` int32: the places in the list of each seat's pairs, ascending; the tail's follow them.
        ``offset_Z1`` int32: where each seat's begin.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong sizes; on the CPU, or with ``MOETRAIN_DEBUG=1``, also lists that break a promise above; on
            CUDA more than 12000 seats.
    """
    lists = (token_N, offset_E1, num_tokens, seat_offset_E1, holder_Z, share_Z)
    pair_N, offset_Z1 = OPS.assign_seats(*lists, num_groups, source, domain_size)
    return pair_N, offset_Z1


@torch.library.register_fake("moetrain::assign_seats")
def _assign_seats_fake(
    token_N: Tensor,
    offset_E1: Tensor,
    num_tokens: int,
    seat_offset_E1: Tensor,
    holder_Z: Tensor,
    share_Z: Tensor,
    num_groups: int,
    source: int,
    domain_size: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(token_N), token_N.new_empty(holder_Z.shape[0] + 1)
