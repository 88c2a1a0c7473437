"""Offers that round_pairs must not trust. Shapes: T tokens, E experts, M rows of a tile, W ranks."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moetrain.ops import Offers, RoundedPairs, offer_pairs, round_pairs, route

RULES = ("nearest", "stochastic", "nearest_score", "balance", "up", "down")
Part = tuple[Tensor, Tensor, Tensor]  # score_TE, token_N, offset_E1


def make(num_tokens: int, num_experts: int = 6, seed: int = 0) -> tuple[Part, Tensor]:
    """A rank's pairs and its tokens' global ids."""
    logits_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    routing = route(logits_TE, 2)
    gid_T2 = torch.stack((torch.full((num_tokens,), seed), torch.arange(num_tokens)), 1)
    return (logits_TE.softmax(-1), routing.token_N, routing.offset_E1), gid_T2


def copied(offers: Offers) -> Offers:
    return Offers(offers.offers_EX.clone(), offers.token_E2M.clone())


def check_sane(pairs: Part, rounded: RoundedPairs) -> None:
    """What every rounded list is, whoever decided it."""
    score_TE, token_N, offset_E1 = pairs
    num_experts = score_TE.shape[1]
    bounds, before = rounded.offset_E1.tolist(), offset_E1.tolist()
    assert bounds[0] == 0
    assert bounds[-1] <= len(rounded.token_P)
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        tokens, sources = rounded.token_P[start:stop].tolist(), rounded.source_P[start:stop].tolist()
        assert tokens == sorted(set(tokens))
        old = token_N[before[expert] : before[expert + 1]].tolist()
        assert len(set(tokens) - set(old)) == rounded.added_E[expert]
        assert len(set(old) - set(tokens)) == rounded.dropped_E[expert]
        for token, source in zip(tokens, sources, strict=True):
            if source < len(token_N):
                assert before[expert] <= source < before[expert + 1]
                assert token_N[source] == token
            else:
                assert source - len(token_N) == token * num_experts + expert
                assert token not in old


@pytest.mark.parametrize(("mine", "theirs"), [(3, 2000), (2000, 3), (64, 64)])
@pytest.mark.parametrize("rule", RULES)
def test_a_wrong_rank_is_refused(mine: int, theirs: int, rule: str) -> None:
    (pairs, gid_T2), (other, other_gid_T2) = make(mine, 16), make(theirs, 16, seed=1)
    offers, others = offer_pairs(*pairs, gid_T2, 32), offer_pairs(*other, other_gid_T2, 32)
    offers_WEX = torch.stack((offers.offers_EX, others.offers_EX))
    check_sane(pairs, round_pairs(*pairs, offers, 32, rule, offers_WEX=offers_WEX, rank=0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"round_pairs: in the offers of rank 1 to expert \d+ .* as rank \(here 1\)"):
        round_pairs(*pairs, offers, 32, rule, offers_WEX=offers_WEX, rank=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("listed", "offered"), [(2, 4000), (4000, 2), (64, 64)])
def test_offers_of_another_list_are_refused(listed: int, offered: int) -> None:
    (pairs, _), (other, gid_T2) = make(listed, 64), make(offered, 64, seed=1)
    with pytest.raises(ValueError, match=r"of rank 0 to expert \d+ .*give what offer_pairs made of these very scores"):
        round_pairs(*pairs, offer_pairs(*other, gid_T2, 256), 256, "up")


def test_the_same_pairs_with_other_scores_are_refused() -> None:
    (score_TE, token_N, offset_E1), gid_T2 = make(64)
    offers = offer_pairs(score_TE, token_N, offset_E1, gid_T2, 8)
    with pytest.raises(ValueError, match=r"each token must have the score that it was offered with, got \d+; give"):
        round_pairs(score_TE * 0.5, token_N, offset_E1, offers, 8, "up")


def test_pairs_of_tokens_that_are_not_valid_are_no_candidates() -> None:
    pairs, gid_T2 = make(40)
    offers = offer_pairs(*pairs, gid_T2, 8, valid_T=torch.zeros(40, dtype=torch.bool))
    assert offers.offers_EX[:, 1].tolist() == [0] * 6
    check_sane(pairs, round_pairs(*pairs, offers, 8, "up"))


def put(row: int, value: int) -> Callable[[Offers], None]:
    """Write to the counts (0 to 3) of expert 2."""

    def change(offers: Offers) -> None:
        offers.offers_EX[2, row] = value

    return change


def put_token(side: int, idx: int, value: int) -> Callable[[Offers], None]:
    def change(offers: Offers) -> None:
        offers.token_E2M[2, side, idx] = value

    return change


def repeat_token(side: int) -> Callable[[Offers], None]:
    def change(offers: Offers) -> None:
        offers.token_E2M[2, side, 1] = offers.token_E2M[2, side, 0]

    return change


def swap_sides(offers: Offers) -> None:
    offers.token_E2M[2] = offers.token_E2M[2].flip(0)


MISUSES = [
    (put(0, -1), r"the chosen pairs must be between 0 and 2147483647, got -1"),
    (put(0, 9), r"the chosen pairs must be the list's \d+, got 9"),
    (put(1, -1), r"the candidates must be between 0 and 2147483647, got -1"),
    (put(1, 60), r"the candidates must be at most T - chosen = \d+, got 60"),
    (put(2, -1), r"the tokens to drop must number between 0 and min\(tile, chosen\) = 8, got -1"),
    (put(2, 9), r"the tokens to drop must number between 0 and min\(tile, chosen\) = 8, got 9"),
    (put(3, -1), r"the tokens to fill must number between 0 and min\(tile, candidates\) = 8, got -1"),
    (put(3, 9), r"the tokens to fill must number between 0 and min\(tile, candidates\) = 8, got 9"),
    (put_token(0, 1, -1), r"each offered token must be between 0 and 59, got -1"),
    (put_token(1, 7, 60), r"each offered token must be between 0 and 59, got 60"),
    (repeat_token(0), r"tokens to drop must be distinct and of the list, got \d+"),
    (repeat_token(1), r"tokens to fill must be distinct and not of the list, got \d+"),
    (swap_sides, r"tokens to drop must be distinct and of the list, got \d+"),
    (put(4, 17), r"each token must have the score that it was offered with, got \d+"),
]


@pytest.mark.parametrize(("change", "text"), MISUSES, ids=[text for _, text in MISUSES])
def test_each_way_to_disagree_with_the_list_is_named(change: Callable[[Offers], None], text: str) -> None:
    pairs, gid_T2 = make(60)
    offers = copied(offer_pairs(*pairs, gid_T2, 8))
    round_pairs(*pairs, offers, 8, "nearest")
    change(offers)
    with pytest.raises(ValueError, match=rf"round_pairs: in the offers of rank 0 to expert 2 {text}; give"):
        round_pairs(*pairs, offers, 8, "nearest")


@pytest.mark.parametrize("row", [0, 1, 2, 3])
def test_counts_of_other_ranks_keep_to_their_limits(row: int) -> None:
    pairs, gid_T2 = make(60)
    offers = offer_pairs(*pairs, gid_T2, 8)
    for value in (-1, 2**31):
        offers_WEX = torch.stack((offers.offers_EX, offers.offers_EX))
        offers_WEX[1, 4, row] = value
        with pytest.raises(ValueError, match=rf"of rank 1 to expert 4 the .* between 0 and .*, got {value};"):
            round_pairs(*pairs, offers, 8, "up", offers_WEX=offers_WEX, rank=0)


def test_damaged_offers_are_refused_or_give_a_list() -> None:
    chance = random.Random(0)
    parts = [make(num_tokens, seed=num_tokens) for num_tokens in (1, 17, 60)]
    made = [offer_pairs(*pairs, gid_T2, 8) for pairs, gid_T2 in parts]
    refused = accepted = 0
    for _ in range(1500):
        rank = chance.randrange(3)
        offers = copied(made[rank if chance.random() < 0.9 else chance.randrange(3)])
        offers_WEX = torch.stack([offer.offers_EX for offer in made])
        values = (-(2**63), -1, 0, 1, 7, 8, 9, 59, 60, 2**31 - 1, 2**31, 2**63 - 1, chance.randrange(60))
        for _ in range(chance.randrange(3)):
            expert, value = chance.randrange(6), chance.choice(values)
            if chance.random() < 0.3:
                offers.token_E2M[expert, chance.randrange(2), chance.randrange(8)] = max(-1, min(value, 2**31 - 1))
            else:
                column = chance.randrange(4) if chance.random() < 0.7 else chance.randrange(offers_WEX.shape[2])
                offers_WEX[chance.randrange(3), expert, column] = value
        pairs, rule = parts[rank][0], chance.choice(RULES)
        try:
            rounded = round_pairs(*pairs, offers, 8, rule, offers_WEX=offers_WEX, rank=rank)  # type: ignore[arg-type]
        except ValueError as error:
            refused += "give what offer_pairs made" in str(error)
        else:
            accepted += 1
            check_sane(pairs, rounded)
    assert refused + accepted == 1500
    assert 300 < refused < 1200
