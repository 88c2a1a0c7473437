"""To which rank the tokens of each expert go, and which rows that makes a rank send.

Shapes: E experts, e experts held here, N pairs (capacity), W ranks, C rows (capacity), K = 2 + most experts of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.config import NotBuiltYetError
from moetrain.moe.routing import PairList
from moetrain.ops import plan_sends
from moetrain.placement.placement import Placement


class SendPlan(NamedTuple):
    """A rank's side of an exchange of rows, on the device.

    Args:
        token_C: int32, the token of each row to send, destinations ascending; unwritten beyond their number.
        pair_N: int32, the place in the list of pairs of each pair to send, destinations ascending; likewise.
        block_row_N: int32, the row of each such pair inside its destination's block.
        counts_WK: int64, for each destination: rows, a flag, and pairs of each of its experts.
    """

    token_C: Tensor
    pair_N: Tensor
    block_row_N: Tensor
    counts_WK: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Destinations:
    """Where the tokens of each of some experts go, among the ranks of a group (or the nodes of several).

    Args:
        rank_E: int32, index in the group of the rank to which this rank sends expert e's tokens.
        local_E: int32, index of e among the experts held by that rank.
        max_local: most experts that any rank of the group holds.
        num_local: experts held here.
        num_ranks: W, of the group.
    """

    rank_E: Tensor
    local_E: Tensor
    max_local: int
    num_local: int
    num_ranks: int

    @staticmethod
    def of(
        ranks_E: Sequence[int], held: Sequence[Sequence[int]], group_rank: int, device: torch.device
    ) -> "Destinations":
        """From the destination of each expert and the experts each rank of the group holds, ascending."""
        index_at = [{expert: index for index, expert in enumerate(experts)} for experts in held]
        local_E = [index_at[rank][e] for e, rank in enumerate(ranks_E)]
        return Destinations(
            rank_E=torch.tensor(ranks_E, dtype=torch.int32, device=device),
            local_E=torch.tensor(local_E, dtype=torch.int32, device=device),
            max_local=max(map(len, held)),
            num_local=len(held[group_rank]),
            num_ranks=len(held),
        )

    def plan_sends(self, pairs: PairList, bad_1: Tensor) -> SendPlan:
        """What leaves this rank: a token once per destination, however many of its experts are there.

        Four experts on two ranks, three tokens with two experts each:

            pairs:           expert  0  1  2     3          expert 0, 1 -> rank 0
                             token   0  2  0  1  1  2       expert 2, 3 -> rank 1

            token_C          0  2  | 0  1  2                token 1 chose both experts of rank 1: one row for two pairs
            pair_N           0  1  | 2  3  4  5             place in the list above
            block_row_N      0  1  | 0  1  1  2             which row of its block each pair is about
            counts_WK        rows 2, flag 0, pairs 1 1      for rank 0
                             rows 3, flag 0, pairs 2 2      for rank 1

        Args:
            pairs: over these experts.
            bad_1: int32, a flag that goes to every rank with the counts.
        """
        return SendPlan(
            *plan_sends(
                pairs.token_N,
                pairs.offset_E1,
                self.rank_E,
                self.local_E,
                bad_1,
                num_tokens=pairs.num_tokens,
                num_ranks=self.num_ranks,
                max_local=self.max_local,
            )
        )


def destinations_in(placement: Placement, pool_ranks: Sequence[int], here: int) -> list[int]:
    """Index in the group of the rank to which pool rank ``here`` sends each expert's tokens.

    Raises:
        NotBuiltYetError: if an expert's tokens go outside the group.
    """
    index_of = {rank: index for index, rank in enumerate(pool_ranks)}
    ranks_E = [placement.destination(here, expert) for expert in range(placement.num_experts)]
    outside = sorted(set(ranks_E) - set(pool_ranks))
    if outside:
        raise NotBuiltYetError(
            "placement.quotas", outside, f"send tokens of pool rank {here} to pool ranks {list(pool_ranks)} only"
        )
    return [index_of[rank] for rank in ranks_E]
