"""To which rank the tokens of each expert, or seat, go, and which rows that makes a rank send.

Shapes: E experts or seats, e experts held here, N pairs (capacity), W ranks, C rows (capacity), K = 2 + most experts of
a rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from moetrain.moe.routing import PairList
from moetrain.ops import plan_sends


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
    """Where the tokens of each of some experts or seats go, among the ranks of a group (or the nodes of several).

    Args:
        rank_E: int32, index in the group of the rank to which this rank sends the tokens of e.
        local_E: int32, index of e's expert among those held by that rank (of the seat among those of the node).
        max_local: as many experts as any rank of the group holds, or more.
        num_local: experts held here.
        num_ranks: W, of the group.
    """

    rank_E: Tensor
    local_E: Tensor
    max_local: int
    num_local: int
    num_ranks: int

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
