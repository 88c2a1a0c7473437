"""route against what it fuses, to the bit, and against its plain-torch definition."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops import Routed, gather_rows, group_pairs, route, select_experts
from moetrain.ops.reference_route import route_reference
from moetrain.ops.select_experts import Score

SCORES: tuple[Score, ...] = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
SHAPES = [
    {},
    {"num_null": 5},
    {"num_groups": 4, "groups_kept": 2},
    {"num_groups": 4, "groups_kept": 2, "group_rule": "max"},
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def unfused(logits_TE: Tensor, top_k: int, **options: Any) -> Routed:
    """The operators that route fuses, one after the other."""
    chosen = select_experts(logits_TE, top_k, **options)
    num_true = logits_TE.shape[1] - options.get("num_null", 0)
    pair_N, offset_E1 = group_pairs(chosen.expert_id_TK.view(-1), num_true)
    weight_N = gather_rows(chosen.weight_TK.reshape(-1, 1), pair_N).view(-1)
    place_N = torch.empty_like(pair_N)
    place_N[pair_N.long()] = torch.arange(len(pair_N), dtype=torch.int32, device=pair_N.device)
    return Routed(
        token_N=(pair_N // top_k).int(),
        weight_N=weight_N,
        offset_E1=offset_E1,
        expert_id_TK=chosen.expert_id_TK,
        place_TK=place_N.view_as(chosen.expert_id_TK),
        prob_sum_GE=chosen.prob_sum_GE,
        count_GE=chosen.count_GE,
        bad_1=chosen.bad_1,
    )


def make_inputs(dtype: torch.dtype, device: str, num_tokens: int = 37, num_experts: int = 24) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(num_tokens * num_experts)
    return {
        "logits_TE": (2 * torch.randn(num_tokens, num_experts, generator=random)).to(dtype).to(device),
        "bias_E": (0.1 * torch.randn(num_experts, generator=random, dtype=torch.float64)).to(device),
        "valid_T": (torch.rand(num_tokens, generator=random) > 0.2).to(device),
        "segment_T": torch.randint(0, 3, (num_tokens,), generator=random, dtype=torch.int32).to(device),
    }


def require_same_bits(got: Routed, wanted: Routed) -> None:
    for field in dataclasses.fields(Routed):
        mine, other = getattr(got, field.name), getattr(wanted, field.name)
        assert mine.dtype == other.dtype, field.name
        assert torch.equal(mine, other), field.name


def require_close(got: Routed, wanted: Routed, tolerance: float) -> None:
    for field in dataclasses.fields(Routed):
        mine, other = getattr(got, field.name), getattr(wanted, field.name)
        assert mine.dtype == other.dtype, field.name
        if mine.is_floating_point():
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(mine, other), field.name


def gradient(router: Callable[..., Routed], logits_TE: Tensor, top_k: int, options: dict[str, Any]) -> Tensor:
    """Of sums with fixed random factors, so that every element of the list pulls differently."""
    leaf_TE = logits_TE.detach().clone().requires_grad_()
    routed = router(leaf_TE, top_k, **options)
    random = torch.Generator().manual_seed(1)
    pulls = [torch.randn(x.shape, generator=random).to(x) for x in (routed.weight_N, routed.prob_sum_GE)]
    torch.autograd.backward([routed.weight_N, routed.prob_sum_GE], pulls)
    assert leaf_TE.grad is not None
    return leaf_TE.grad


def require_equal_to_unfused(logits_TE: Tensor, top_k: int, **options: Any) -> None:
    require_same_bits(route(logits_TE, top_k, **options), unfused(logits_TE, top_k, **options))
    gradients = [gradient(router, logits_TE, top_k, options) for router in (route, unfused)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_has_the_bits_of_what_it_fuses(
    device: str, score: Score, shape: dict[str, Any], renormalise: bool, biased: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs(dtype, device)
    options: dict[str, Any] = {"score": score, "renormalise": renormalise, "scale": 2.5, "num_segments": 3, **shape}
    options |= {"valid_T": inputs["valid_T"], "segment_T": inputs["segment_T"]}
    options |= {"bias_E": inputs["bias_E"]} if biased else {}
    require_equal_to_unfused(inputs["logits_TE"], 4, **options)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_definition(device: str, dtype: torch.dtype, score: Score) -> None:
    inputs = make_inputs(dtype, device)
    options: dict[str, Any] = {"score": score, "num_null": 3, "valid_T": inputs["valid_T"]}
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    logits_TE = inputs["logits_TE"]
    require_close(route(logits_TE, 4, **options), route_reference(logits_TE, 4, **options), tolerance)
    gradients = [gradient(router, logits_TE, 4, options) for router in (route, route_reference)]
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "sizes",
    [(0, 8, 2), (1, 1, 1), (1, 8, 8), (3, 7, 7), (600, 129, 8), (2, 1000, 40), (1500, 60, 6), (9, 70, 16), (9, 70, 17)],
    ids=str,
)
def test_odd_sizes(device: str, sizes: tuple[int, int, int]) -> None:
    num_tokens, num_experts, top_k = sizes
    for dtype in (torch.float32, torch.float64):
        require_equal_to_unfused(make_inputs(dtype, device, num_tokens, num_experts)["logits_TE"], top_k)
    routed = route(make_inputs(torch.float32, device, num_tokens, num_experts)["logits_TE"], top_k)
    assert routed.offset_E1[-1] == num_tokens * top_k


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("num_experts", [17, 64, 65, 300])
def test_every_network_chooses_in_total_order(num_experts: int, top_k: int) -> None:
    random = torch.Generator().manual_seed(num_experts + top_k)
    few = torch.randint(-3, 4, (50, num_experts), generator=random).float()  # many ties
    many = torch.randn(50, num_experts, generator=random)
    for logits_TE in (few, many, -many.abs(), many.sort(1).values, many.sort(1, descending=True).values):
        wanted_TK = logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        assert torch.equal(route(logits_TE, top_k).expert_id_TK.long(), wanted_TK)
        assert torch.equal(route(logits_TE.double(), top_k).expert_id_TK.long(), wanted_TK)


def test_experts_that_nobody_chose(device: str) -> None:
    logits_TE = torch.zeros(6, 5, device=device)
    logits_TE[:, 3] = 2.0
    logits_TE[4, 1] = 1.0
    routed = route(logits_TE, 1)
    assert routed.offset_E1.tolist() == [0, 0, 0, 0, 6, 6]
    assert routed.token_N.tolist() == [0, 1, 2, 3, 4, 5]
    routed = route(logits_TE, 2, valid_T=torch.tensor([True, False, False, False, True, True], device=device))
    assert routed.offset_E1.tolist() == [0, 2, 3, 3, 6, 6]
    assert routed.token_N.tolist() == [0, 5, 4, 0, 4, 5, 1, 1, 2, 2, 3, 3]
    assert routed.weight_N[6:].tolist() == [0.0] * 6
    assert routed.place_TK.tolist() == [[3, 0], [6, 7], [8, 9], [10, 11], [4, 2], [5, 1]]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, 4))
    num_experts = num_groups * data.draw(st.integers(1, 20))
    groups_kept = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, groups_kept * num_experts // num_groups))
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = make_inputs(dtype, "cpu", data.draw(st.sampled_from([0, 1, 2, 9, 130, 300])), num_experts)
    segments = data.draw(st.booleans())
    logits_TE = inputs["logits_TE"].round() if data.draw(st.booleans()) else inputs["logits_TE"]  # rounded ones tie
    if logits_TE.numel() and data.draw(st.booleans()):
        logits_TE[0, -1] = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    require_equal_to_unfused(
        logits_TE,
        top_k,
        score=data.draw(st.sampled_from(SCORES)),
        renormalise=data.draw(st.booleans()),
        num_null=data.draw(st.integers(0, num_experts - 1)) if num_groups == 1 else 0,
        num_groups=num_groups,
        groups_kept=groups_kept,
        group_rule=data.draw(st.sampled_from(["top2_sum", "max"])),
        bias_E=data.draw(st.sampled_from([None, inputs["bias_E"]])),
        valid_T=data.draw(st.sampled_from([None, inputs["valid_T"]])),
        segment_T=inputs["segment_T"] if segments else None,
        num_segments=3 if segments else 1,
    )


def test_a_wrong_result_is_caught(device: str) -> None:
    logits_TE = make_inputs(torch.float32, device)["logits_TE"]
    good, wanted = route(logits_TE, 4), unfused(logits_TE, 4)
    require_same_bits(good, wanted)
    swapped_N = good.token_N.clone()
    swapped_N[[0, 1]] = swapped_N[[1, 0]]
    wrong = {
        "token_N": swapped_N,
        "weight_N": good.weight_N * (1 + 2e-7),
        "offset_E1": good.offset_E1.roll(1),
        "expert_id_TK": good.expert_id_TK.flip(1),
        "place_TK": good.place_TK.flip(1),
        "prob_sum_GE": good.prob_sum_GE * (1 + 2e-7),
        "count_GE": good.count_GE.roll(1, 1),
        "bad_1": good.bad_1 + 1,
    }
    for field, value in wrong.items():
        with pytest.raises(AssertionError, match=field):
            require_same_bits(dataclasses.replace(good, **{field: value}), wanted)
    other_TE = gradient(route, logits_TE, 4, {"renormalise": False})
    assert not torch.equal(gradient(route, logits_TE, 4, {}), other_TE), "another gradient must show"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_is_flagged_and_left_out(device: str, bad: float) -> None:
    logits_TE = make_inputs(torch.float32, device)["logits_TE"]
    broken_TE = logits_TE.clone()
    broken_TE[5, 3] = bad
    without_T = torch.arange(len(logits_TE), device=device) != 5
    got, wanted = route(broken_TE, 4), route(logits_TE, 4, valid_T=without_T)
    assert got.bad_1.item() == 1
    require_same_bits(dataclasses.replace(got, bad_1=got.bad_1 - 1), wanted)
    assert route(broken_TE, 4, valid_T=without_T).bad_1.item() == 0
    require_equal_to_unfused(broken_TE, 4)
    assert not gradient(route, broken_TE, 4, {})[5].any()


def test_what_the_gradient_holds_beyond_the_list_is_ignored(device: str) -> None:
    inputs = make_inputs(torch.float64, device)
    logits_TE = inputs["logits_TE"].requires_grad_()
    for score in SCORES:
        routed = route(logits_TE, 4, score=score, valid_T=inputs["valid_T"], num_null=3)
        dweight_N = torch.ones_like(routed.weight_N)
        (wanted_TE,) = torch.autograd.grad(routed.weight_N, logits_TE, dweight_N, retain_graph=True)
        dweight_N[int(routed.offset_E1[-1]) :] = torch.nan
        (got_TE,) = torch.autograd.grad(routed.weight_N, logits_TE, dweight_N)
        assert torch.equal(got_TE, wanted_TE)


@pytest.mark.parametrize("num_segments", [1, 3])
def test_the_number_of_threads_changes_nothing(num_segments: int) -> None:
    inputs = make_inputs(torch.float32, "cpu", 3000, 60)
    options: dict[str, Any] = {"valid_T": inputs["valid_T"], "num_segments": num_segments}
    options |= {"segment_T": inputs["segment_T"]} if num_segments > 1 else {}
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            logits_TE = inputs["logits_TE"]
            results.append((route(logits_TE, 4, **options), gradient(route, logits_TE, 4, options)))
            require_equal_to_unfused(logits_TE, 4, **options)
    finally:
        torch.set_num_threads(before)
    (first, first_gradient), *others = results
    for got, got_gradient in others:
        require_same_bits(got, first)
        assert torch.equal(got_gradient, first_gradient)


def test_rows_may_be_apart(device: str) -> None:
    wide_TE = make_inputs(torch.float32, device, 20, 48)["logits_TE"]
    require_same_bits(route(wide_TE[:, 8:32], 4), route(wide_TE[:, 8:32].contiguous(), 4))
    require_equal_to_unfused(wide_TE[::2, :24], 4)


@pytest.mark.parametrize("score", SCORES)
def test_gradient_in_float64(device: str, score: Score) -> None:
    inputs = make_inputs(torch.float64, device, 6, 8)
    inputs["logits_TE"].requires_grad_()

    def differentiable(logits_TE: Tensor, renormalise: bool) -> tuple[Tensor, Tensor]:
        routed = route(
            logits_TE, 3, score=score, renormalise=renormalise, num_null=2, bias_E=inputs["bias_E"], scale=1.5,
            valid_T=inputs["valid_T"], segment_T=inputs["segment_T"], num_segments=3,
        )  # fmt: skip
        return routed.weight_N, routed.prob_sum_GE

    for renormalise in (False, True):
        assert torch.autograd.gradcheck(partial(differentiable, renormalise=renormalise), (inputs["logits_TE"],))


def test_gradients_of_one_output_alone(device: str) -> None:
    inputs = make_inputs(torch.float64, device)
    logits_TE = inputs["logits_TE"].requires_grad_()
    routed = route(logits_TE, 4, segment_T=inputs["segment_T"], num_segments=3)
    pulls = [torch.randn_like(x) for x in (routed.weight_N, routed.prob_sum_GE)]
    (both_TE,) = torch.autograd.grad([routed.weight_N, routed.prob_sum_GE], logits_TE, pulls, retain_graph=True)
    (one_TE,) = torch.autograd.grad(routed.weight_N, logits_TE, pulls[0], retain_graph=True)
    (other_TE,) = torch.autograd.grad(routed.prob_sum_GE, logits_TE, pulls[1])
    assert one_TE.any()
    assert other_TE.any()
    torch.testing.assert_close(one_TE + other_TE, both_TE, rtol=1e-13, atol=1e-13)


def test_registration(device: str) -> None:
    inputs = make_inputs(torch.float64, device)
    logits_TE = inputs["logits_TE"].requires_grad_()
    args = (logits_TE, 4, "sigmoid", inputs["bias_E"], 0, 4, 2, "max", True, 2.5, inputs["valid_T"])
    # opcheck's own run through AOTAutograd adds a float output to an int one in place; see the next test.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.moetrain.route.default, (*args, inputs["segment_T"], 3), test_utils=checks)
    routed = route(logits_TE.detach(), 4)
    gradients = (torch.randn_like(routed.weight_N), torch.randn_like(routed.prob_sum_GE))
    saved = (logits_TE.detach(), routed.expert_id_TK, routed.place_TK)
    backward_args = (*gradients, *saved, "softmax", 0, True, 1.0, None, None)
    torch.library.opcheck(torch.ops.moetrain.route_backward.default, backward_args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_through_aot_autograd(device: str, dynamic: bool) -> None:
    def loss_of(logits_TE: Tensor) -> tuple[Tensor, Routed]:
        routed = route(logits_TE, 4, score="sigmoid", num_null=2)
        return routed.weight_N.square().sum() + routed.prob_sum_GE.square().sum(), routed

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for num_tokens in (37, 5):
        logits_TE = make_inputs(torch.float64, device, num_tokens)["logits_TE"].requires_grad_()
        loss, routed = compiled(logits_TE)
        wanted_loss, wanted = loss_of(logits_TE)
        require_same_bits(routed, wanted)
        assert torch.equal(*(torch.autograd.grad(each, logits_TE)[0] for each in (loss, wanted_loss)))


LOGITS = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"logits_TE": torch.zeros(8)}, ValueError, r"logits must be \[T, E\] with E >= 1, got \[8\]"),
        ({"logits_TE": torch.zeros(8, 3).T}, ValueError, "the last dimension of logits must have stride 1, got sizes"),
        ({"top_k": 9}, ValueError, "top_k must be between 1 and 8 .*, got 9"),
        ({"score": "softmix"}, ValueError, "score must be 'softmax', .* got 'softmix'"),
        ({"num_null": 8}, ValueError, "num_null must be between 0 and E - 1 = 7, got 8"),
        ({"valid_T": torch.ones(2).bool()}, ValueError, r"valid must be \[T\] = \[3\], got \[2\]"),
        (
            {"segment_T": torch.tensor([0, 2, 0]).int(), "num_segments": 2},
            ValueError,
            r"segments must be in \[0, 2\), got 2 at token 1; raise num_segments",
        ),
        (
            {"logits_TE": torch.zeros(1, 8).expand(2**29, 8), "top_k": 4},
            ValueError,
            r"the number of pairs \(T \* K\) must be between 0 and 2147483647",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"logits_TE": LOGITS, "top_k": 2, **arguments}
    with pytest.raises(error, match=f"route: {text}"):
        route(**given)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"expert_id_TK": 7}, r"route_backward: expert ids must be -1 or in \[0, 8\), got 8 at position 1"),
        ({"place_TK": 6}, r"route_backward: places must be in \[0, 6\), got \d+ at position 0; pass what route gave"),
    ],
    ids=str,
)
def test_backward_refuses_what_would_index_beyond(change: dict[str, int], text: str) -> None:
    routed = route(LOGITS, 2)
    names = ("weight_N", "prob_sum_GE", "expert_id_TK", "place_TK")
    dweight_N, dprob_GE, expert_id_TK, place_TK = (getattr(routed, name) + change.get(name, 0) for name in names)
    with pytest.raises(ValueError, match=text):
        torch.ops.moetrain.route_backward(
            dweight_N, dprob_GE, LOGITS, expert_id_TK, place_TK, "softmax", 0, True, 1.0, None, None
        )


def test_backward_names_wrong_sizes() -> None:
    routed = route(LOGITS, 2)
    args = (routed.prob_sum_GE, LOGITS, routed.expert_id_TK)
    options = ("softmax", 0, True, 1.0, None, None)
    with pytest.raises(ValueError, match=r"route_backward: place must be \[T, K\] = \[3, 2\], got \[2, 2\]"):
        torch.ops.moetrain.route_backward(routed.weight_N, *args, routed.place_TK[1:], *options)
    with pytest.raises(ValueError, match=r"route_backward: dweight must be \[T \* K\] = \[6\], got \[5\]"):
        torch.ops.moetrain.route_backward(routed.weight_N[1:], *args, routed.place_TK, *options)
