"""The examples drawn in the docstrings of planning are what planning does."""

import pytest
import torch
from moe.dispatch.helpers import Mode, destinations_of, make_groups
from ranks import run_on_ranks
from torch import Tensor

from moetrain.moe import Padding, Routing
from moetrain.moe.dispatch.all_to_all import make_seat_tables
from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.moe.dispatch.padded import plan_padded
from moetrain.moe.dispatch.plan import PendingHop, Split
from moetrain.moe.dispatch.seats import NodeDestinations
from moetrain.moe.dispatch.two_level import plan_two_level
from moetrain.moe.routing import PairList
from moetrain.placement.static import plan_static

NOT_BAD = torch.zeros(1, dtype=torch.int32)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


FOUR_ON_TWO = destinations_of([0, 0, 1, 1], [[0, 1], [2, 3]], 1)
THREE_TOKENS = PairList(ints(0, 2, 0, 1, 1, 2), ints(0, 1, 2, 4, 6), 3)


def test_a_token_with_two_experts_on_a_rank_is_one_row_for_it() -> None:
    sends = FOUR_ON_TWO.plan_sends(THREE_TOKENS, NOT_BAD)
    assert sends.token_C[:5].tolist() == [0, 2, 0, 1, 2]
    assert sends.pair_N.tolist() == [0, 1, 2, 3, 4, 5]
    assert sends.block_row_N.tolist() == [0, 1, 0, 1, 1, 2]
    assert sends.counts_WK.tolist() == [[2, 0, 1, 1], [3, 0, 2, 2]]


def test_received_pairs_are_regrouped_by_expert() -> None:
    """On rank 1; its own token's experts come in the order of the list, 2 first."""
    own = FOUR_ON_TWO.plan_sends(PairList(ints(0, 0), ints(0, 0, 0, 1, 2), 1), NOT_BAD)
    hop = PendingHop(None, own, Split([0, 1], [0, 2]), Split([3, 1], [4, 2]), 1, None)  # type: ignore[arg-type]
    counts_WK = torch.stack((torch.tensor([3, 0, 2, 2]), own.counts_WK[1]))
    row_P, done = hop.finish(ints(0, 1, 1, 2, 0, 0)[:, None], counts_WK, 2)
    assert done.recv_pair_P.tolist() == [0, 1, 4, 2, 3, 5]
    assert row_P.tolist() == [0, 1, 3, 1, 2, 3]
    assert done.offset_E1.tolist() == [0, 3, 6]


def routing_of(token_N: Tensor, offset_E1: Tensor, num_tokens: int, limit: int | None = None) -> Routing:
    gid_T2 = torch.zeros(num_tokens, 2, dtype=torch.int64)
    return Routing(token_N, torch.ones(len(token_N)), offset_E1, gid_T2, num_tokens, limit).validate()


def two_level_body(rank: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Rows and pairs that this rank sends on the first and on the second hop."""
    groups = make_groups(Mode(per_node=2))
    try:
        to = make_seat_tables(groups).of(plan_static(groups.mesh, 4)).to
        assert isinstance(to, NodeDestinations)
        routing = routing_of(ints(), ints(0, 0, 0, 0, 0), 0)
        if rank == 0:
            routing = routing_of(ints(0, 0, 1), ints(0, 0, 0, 1, 3), 2)  # expert 2: A; expert 3: A and B
        (plan,) = plan_two_level([routing], to, NOT_BAD, DispatchGroups.of(groups))
        first, second = plan.hops
        return first.send_rows, first.send_pairs, second.send_rows, second.send_pairs
    finally:
        groups.close()


@pytest.mark.dist
def test_a_token_crosses_to_a_node_once() -> None:
    nothing = [0, 0]
    assert run_on_ranks(4, two_level_body) == [
        ([0, 2], [0, 3], nothing, nothing),
        (nothing, nothing, nothing, nothing),
        (nothing, nothing, [1, 2], [1, 2]),
        (nothing, nothing, nothing, nothing),
    ]


def padded_body(rank: int) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and places of the pairs in the blocks for each rank."""
    groups = make_groups(Mode())
    try:
        routing = routing_of(ints(), ints(0, 0, 0, 0, 0), 0, limit=2)
        if rank == 0:
            routing = routing_of(THREE_TOKENS.token_N, THREE_TOKENS.offset_E1, 3, limit=2)
        to = destinations_of([0, 0, 1, 1], [[0, 1], [2, 3]], rank)
        (plan,) = plan_padded([routing], to, DispatchGroups.of(groups), Padding(3, 2))
        (hop,) = plan.hops
        return hop.send_token_R.view(2, 3).tolist(), hop.send_pair_P.view(2, 4).tolist()
    finally:
        groups.close()


@pytest.mark.dist
def test_blocks_of_fixed_size_are_padded() -> None:
    (tokens_WB, places_WQ), _ = run_on_ranks(2, padded_body)
    assert (tokens_WB[0][:2], tokens_WB[1]) == ([0, 2], [0, 1, 2])
    assert (places_WQ[0][:2], places_WQ[1]) == ([0, 1], [2, 3, 4, 5])
