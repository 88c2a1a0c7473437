"""Token rounding: each expert's number of rows becomes a multiple of a tile (SonicMoE, arXiv 2512.14080).

Shapes: T tokens, E experts, N pairs that come in and P that go out (both capacities), M rows of a tile, W ranks,
X = 4 + 6 M numbers of one expert's offer. On CUDA, M is at most 1,024, what the CPU refuses in the values of pairs and
offers is noticed with ``MOETRAIN_DEBUG=1`` alone, and the kernels are made to have the CPU's bits.

A *cell* is what meets at one holder of one expert: the pairs of all ranks of a group that send there. Its tokens are
ranked on (chosen, score, lower global id first), so that every chosen token outranks every filler. A rule turns the
number of chosen rows, f, into the multiple of M below or above, and so many of the ranking are kept:

- ``nearest``: up if that is closer; ties go down.
- ``stochastic``: up with probability (f - down) / M.
- ``nearest_score``: up with probability (sum of the scores that going down loses) / (that + what going up gains).
- ``balance``: up if the rows added so far, less those dropped, come closer to zero by it. The residual runs over the
  cells of one call, by expert and holder, and starts at zero in each call; the total deviates by half a tile at most
  as long as no cell lacks fillers.
- ``up``, ``down``: always so; down is token dropping.

A cell without enough fillers to go up goes down. A cell of fewer tokens than a tile is left as it is: the only
multiple in its reach is zero. M = 1 changes nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.config.moe import RoundRule
from moetrain.ops.native import OPS


@dataclass(frozen=True, slots=True, eq=False)
class Offers:
    """One rank's tokens at the margin: per expert, the M chosen ones to drop first and the M best fillers."""

    offers_EX: Tensor  # int64; what ranks exchange
    token_E2M: Tensor  # int32; the same tokens by their index on this rank, which stays here


@dataclass(frozen=True, slots=True, eq=False)
class RoundedPairs:
    """The pairs that are kept or admitted, grouped by expert, tokens ascending inside one. Nothing has a gradient."""

    token_P: Tensor  # int32
    source_P: Tensor  # int32: the pair's place in the list that came in, or N + t * E + e for a filler
    offset_E1: Tensor  # int32
    added_E: Tensor  # int64: fillers of this rank
    dropped_E: Tensor  # int64: chosen pairs of this rank


def offer_pairs(
    score_TE: Tensor,
    token_N: Tensor,
    offset_E1: Tensor,
    token_gid_T2: Tensor,
    tile: int,
    *,
    valid_T: Tensor | None = None,
) -> Offers:
    """What this rank offers to each expert's holder.

    Args:
        score_TE: float32 or float64; rows may be apart in memory. What is not finite fills nothing; of the chosen,
            NaN goes first.
        token_N: int32, the chosen pairs grouped by expert, tokens ascending; what lies beyond is ignored.
        offset_E1: int32, where each expert's pairs begin.
        token_gid_T2: int64 (sequence, position), distinct: settles ties.
        tile: M.
        valid_T: bool; others fill nothing.

    Raises:
        TypeError: a wrong dtype; narrower scores are refused, since they tie by rounding.
        ValueError: wrong sizes or strides, several devices, or pairs out of order.
    """
    return Offers(*OPS.offer_pairs(score_TE.detach(), token_N, offset_E1, token_gid_T2, valid_T, tile))


def round_pairs(
    score_TE: Tensor,
    token_N: Tensor,
    offset_E1: Tensor,
    offers: Offers,
    tile: int,
    rule: RoundRule = "nearest",
    *,
    key: int = 0,
    offers_WEX: Tensor | None = None,
    holder_WE: Tensor | None = None,
    rank: int = 0,
) -> RoundedPairs:
    """This rank's part of the rounded list.

    Args:
        score_TE: as in ``offer_pairs``, and so are ``token_N`` and ``offset_E1``.
        token_N: see there.
        offset_E1: see there.
        offers: this rank's own.
        tile: M.
        rule: see the module.
        key: from ``key_of``; expert e draws ``counter_uniform(key, e)`` in float64, the same on every rank.
        offers_WEX: all ranks' ``offers_EX`` in the group's order; this rank alone if left out.
        holder_WE: int32, to which holder rank w sends expert e; all to the same one if left out.
        rank: this rank's place among W; ``offers_WEX[rank]`` is its own.

    Returns:
        The list. Weights are gathered after, from weights [N] and scores [T * E] laid end to end, by ``source_P``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong sizes or strides, several devices, an unknown rule, pairs out of order, or offers that cannot
            be: those of ``rank`` must be what ``offer_pairs`` made of this very list, others' counts within their
            limits.
    """
    offers_WEX = offers.offers_EX.unsqueeze(0) if offers_WEX is None else offers_WEX
    return RoundedPairs(
        *OPS.round_pairs(
            score_TE.detach(), token_N, offset_E1, offers_WEX, offers.token_E2M, holder_WE, rank, tile, rule, key
        )
    )


@torch.library.register_fake("moetrain::offer_pairs")
def _offer_pairs_fake(
    score_TE: Tensor, token_N: Tensor, offset_E1: Tensor, token_gid_T2: Tensor, valid_T: Tensor | None, tile: int
) -> tuple[Tensor, Tensor]:
    num_experts = score_TE.shape[1]
    return token_gid_T2.new_empty(num_experts, 4 + 6 * tile), token_N.new_empty(num_experts, 2, tile)


@torch.library.register_fake("moetrain::round_pairs")
def _round_pairs_fake(
    score_TE: Tensor, token_N: Tensor, offset_E1: Tensor, offers_WEX: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    tile, rule = options[-3], options[-2]
    num_tokens, num_experts = score_TE.shape
    most = {"down": 0, "nearest": (tile - 1) // 2}.get(rule, tile - 1)
    capacity = token_N.shape[0] + num_experts * torch.sym_min(most, num_tokens)
    return (
        token_N.new_empty(capacity),
        token_N.new_empty(capacity),
        torch.empty_like(offset_E1),
        offers_WEX.new_empty(num_experts),
        offers_WEX.new_empty(num_experts),
    )
