"""Shares of scores (renormalised weights, probabilities) and their gradients, for any finite logits.

The definition is in numbers that neither underflow nor overflow. Shapes: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_shares import Token, exact_token
from torch import Tensor

from moetrain.ops import Selection, route, select_experts
from moetrain.ops.reference_select_experts import select_experts_reference
from moetrain.ops.select_experts import Score

LONE = ["sigmoid", "sqrtsoftplus"]
SCORES = ["softmax", "topk_softmax", *LONE]
NUM_EXPERTS, TOP_K = 8, 3
# Where float32 and float64 stop telling 1 + e^x from 1 (-17, -37), where e^x is no normal number (-87, -708), where
# its root is none (-174, -1416), beyond; and where scores saturate.
CENTRES = [-15.9, -17.3, -36.7, -50.0, -87.3, -90.0, -103.0, -174.6, -708.4, -745.0, -1417.0, -1e4, -1e30, -3e38]
CENTRES += [0.0, 5.0, 16.6, 36.7, 88.7, 100.0, 709.8, 1e4, 1e30, 3e38]
RELATIVE = {torch.float32: 4e-6, torch.float64: 1e-14}
ABSOLUTE = {torch.float32: 1e-15, torch.float64: 1e-24}  # of shares, which sum to 1


def logits_near(centre: float, dtype: torch.dtype) -> Tensor:
    """Rows around a centre: all near it, two far below, two near 0, all equal."""
    random = torch.Generator().manual_seed(int(abs(centre)) % 1009)
    near_TE = centre * (1 + 1e-7 * torch.randn(3, NUM_EXPERTS, generator=random, dtype=torch.float64))
    near_TE += torch.randn(3, NUM_EXPERTS, generator=random, dtype=torch.float64)
    near_TE[1, [1, 4]] -= 40 + 0.001 * abs(centre)
    near_TE[2, [2, 7]] = torch.tensor([0.5, -1.0], dtype=torch.float64)
    whole_TE = torch.cat((near_TE, torch.full((1, NUM_EXPERTS), centre, dtype=torch.float64)))
    most = torch.finfo(dtype).max
    return whole_TE.clamp(-most, most).to(dtype)


def pulls(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_select(logits_TE: Tensor, **options: Any) -> Selection:
    return select_experts(logits_TE, TOP_K, **options)


def by_route(logits_TE: Tensor, **options: Any) -> Selection:
    routed = route(logits_TE, TOP_K, **options)
    weight_TK = routed.weight_N[routed.place_TK.long()]
    return Selection(routed.expert_id_TK, weight_TK, routed.prob_sum_GE, routed.count_GE, routed.bad_1)


def by_reference(logits_TE: Tensor, **options: Any) -> Selection:
    return select_experts_reference(logits_TE, TOP_K, **options)


WAYS: dict[str, Callable[..., Selection]] = {"select": by_select, "route": by_route, "reference": by_reference}


def require_near(name: str, got: Tensor, exact: list[list[Any]], relative: float, absolute: float) -> None:
    for mine, row in zip(got.tolist(), exact, strict=True):
        for value, wanted in zip(mine, row, strict=True):
            assert abs(value - wanted) <= relative * abs(wanted) + absolute, (name, mine, [float(x) for x in row])


def require_exact(
    way: Callable[..., Selection],
    logits_TE: Tensor,
    score: str,
    *,
    renormalise: bool = True,
    bias_E: Tensor | None = None,
) -> None:
    """Every token's weights, probabilities and gradient equal the definition; each token is its own segment."""
    num_tokens, dtype = len(logits_TE), logits_TE.dtype
    leaf_TE = logits_TE.clone().requires_grad_()
    segment_T = torch.arange(num_tokens, dtype=torch.int32, device=logits_TE.device)
    options = {"renormalise": renormalise, "bias_E": bias_E, "segment_T": segment_T, "num_segments": num_tokens}
    got = way(leaf_TE, score=score, **options)
    assert got.bad_1.item() == 0
    if bias_E is None:
        order_TE = logits_TE.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(got.expert_id_TK.long(), order_TE[:, :TOP_K])
    dweight_TK, dprob_TE = (pulls(x.shape, dtype, seed) for seed, x in enumerate((got.weight_TK, got.prob_sum_GE)))
    torch.autograd.backward([got.weight_TK, got.prob_sum_GE], [x.to(logits_TE.device) for x in (dweight_TK, dprob_TE)])
    assert leaf_TE.grad is not None
    tokens: list[Token] = [
        exact_token(
            logits_TE[t].tolist(), got.expert_id_TK[t].tolist(), score, renormalise=renormalise,
            weight_pulls=dweight_TK[t].tolist(), prob_pulls=dprob_TE[t].tolist(),
        )
        for t in range(num_tokens)
    ]  # fmt: skip
    relative, absolute = RELATIVE[dtype], ABSOLUTE[dtype]
    require_near("weights", got.weight_TK, [token.weights for token in tokens], relative, absolute)
    require_near("probabilities", got.prob_sum_GE, [token.probs for token in tokens], relative, absolute)
    # Differences of pulls cancel: the error is of the largest term, not of what is left.
    require_near("gradient", leaf_TE.grad, [token.gradient for token in tokens], relative, 4 * relative)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("way", WAYS)
def test_shares_and_gradients_are_exact_at_any_logit(device: str, way: str, score: str, dtype: torch.dtype) -> None:
    for centre in CENTRES:
        require_exact(WAYS[way], logits_near(centre, dtype).to(device), score)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("score", LONE)
@pytest.mark.parametrize("way", WAYS)
def test_small_gradients_keep_their_digits(device: str, way: str, score: str, dtype: torch.dtype) -> None:
    """Two of three experts far below the third: their gradients are as small as their shares, and as exact."""
    logits_TE = torch.tensor([[-60.0, -75.5, -80.25, *[-3000.0] * 5], [-20.0, -34.5, -36.0, *[-3000.0] * 5]])
    leaf_TE = logits_TE.to(device, dtype).requires_grad_()
    got = WAYS[way](leaf_TE, score=score)
    dweight_TK = torch.tensor([[0.0, 1.0, -2.0], [0.0, -3.0, 5.0]], dtype=dtype)
    (gradient_TE,) = torch.autograd.grad(got.weight_TK, leaf_TE, dweight_TK.to(device))
    for t in range(2):
        token = exact_token(logits_TE[t].tolist(), [0, 1, 2], score, weight_pulls=dweight_TK[t].tolist())
        for e in (1, 2):
            assert abs(gradient_TE[t, e].item() / token.gradient[e] - 1) < 4 * RELATIVE[dtype]


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("way", WAYS)
def test_a_bias_may_choose_experts_whose_scores_vanish(device: str, way: str, score: str, dtype: torch.dtype) -> None:
    """The others' scores are ordinary: what is renormalised is small, what it is divided by beside it is not."""
    bias_E = torch.tensor([0.0, 9.0, 0, 8.0, 0, 9.5, 0, 0], dtype=dtype) * (1e6 if score == "topk_softmax" else 1)
    logits_TE = torch.tensor([1.0, -120.0, 2.0, -119.0, -3.0, -121.5, 0.5, 0.0], dtype=dtype).repeat(5, 1)
    chosen = torch.tensor([1, 3, 5])
    logits_TE[1, chosen] = torch.tensor([-16.8, -17.1, -16.9], dtype=dtype)
    logits_TE[2, chosen] = torch.tensor([-45.0, -44.0, -47.0], dtype=dtype)
    logits_TE[3, chosen] = torch.tensor([-1e4, -1e4, -1e4 - 2], dtype=dtype)
    logits_TE[4, chosen] = torch.tensor([-90.0, 3.0, -1000.0], dtype=dtype)
    logits_TE, bias_E = logits_TE.to(device), bias_E.to(device)
    got = WAYS[way](logits_TE, score=score, bias_E=bias_E)
    assert got.expert_id_TK.sort(1).values.tolist() == [[1, 3, 5]] * 5
    require_exact(WAYS[way], logits_TE, score, bias_E=bias_E)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_not_renormalised_are_scores_and_may_vanish(
    device: str, way: str, score: str, dtype: torch.dtype
) -> None:
    for centre in CENTRES:
        if score == "sqrtsoftplus" and centre > 1e8:
            continue  # not shares: as large as the root of the logit
        require_exact(WAYS[way], logits_near(centre, dtype).to(device), score, renormalise=False)
    if score in LONE:
        lowest = torch.full((1, NUM_EXPERTS), -1e4, dtype=dtype, device=device, requires_grad=True)
        weight_TK = WAYS[way](lowest, score=score, renormalise=False).weight_TK
        assert weight_TK.tolist() == [[0.0] * TOP_K]
        assert not torch.autograd.grad(weight_TK.sum(), lowest)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("way", WAYS)
def test_weights_and_even_balance_are_one_and_nobody_gains_by_sinking(
    device: str, way: str, score: str, dtype: torch.dtype
) -> None:
    """E * sum of (1 / E) P is 1 per token, at any level; a gradient that pushes scores down would show."""
    for level in (0.0, -50.0, -90.0, -1e4, 60.0, 1e4):
        logits_TE = (level + pulls((4, NUM_EXPERTS), torch.float64, 7)).to(device, dtype)
        masked_T = torch.tensor([True, True, False, True], device=device)
        leaf_TE = logits_TE.clone().requires_grad_()
        got = WAYS[way](leaf_TE, score=score, valid_T=masked_T)
        weight_T, balance = got.weight_TK.sum(1), got.prob_sum_GE.sum() / 3
        torch.testing.assert_close(weight_T, masked_T.to(weight_T.dtype), rtol=0, atol=1e-6)
        torch.testing.assert_close(balance, torch.ones_like(balance), rtol=0, atol=1e-6)
        (pull_TE,) = torch.autograd.grad(weight_T.sum() + balance, leaf_TE)
        assert pull_TE.abs().max() < 1e-6


@pytest.mark.parametrize("num_null", [0, 2])
@pytest.mark.parametrize("score", LONE)
def test_gradient_in_float64_where_scores_vanish(score: Score, num_null: int) -> None:
    logits_TE = torch.randn(6, NUM_EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits_TE += torch.tensor([-36.5, -60.0, -800.0, -1500.0, 30.0, 0.0], dtype=torch.float64)[:, None]
    logits_TE[5, :4] -= 900.0

    def differentiable(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        chosen = select_experts(logits_TE, TOP_K, score=score, num_null=num_null, scale=1.5)
        return chosen.weight_TK, chosen.prob_sum_GE

    assert torch.autograd.gradcheck(differentiable, logits_TE.requires_grad_())


@pytest.mark.parametrize("score", LONE)
@pytest.mark.parametrize("way", WAYS)
def test_groups_are_told_apart_where_scores_vanish(way: str, score: str) -> None:
    """By their two best: 3 + 2 of the last two beat 3.25 + 1e-9 of the first group, at any level."""
    for level in (-10.0, -90.0, -400.0, -1e3):
        logits_TE = level + torch.tensor([[3.25, -20.0, 0.0, 0.0, 3.0, 2.5, 1.0, 1.0]])
        chosen = WAYS[way](logits_TE, score=score, num_groups=4, groups_kept=2)
        assert chosen.expert_id_TK.tolist() == [[0, 4, 5]], level
