"""select_experts against its plain-torch definition. Choices, counts and flags are compared exactly."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops import Selection, route, select_experts
from moetrain.ops.reference_select_experts import select_experts_reference
from moetrain.ops.select_experts import Score

SCORES: tuple[Score, ...] = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
SHAPES = [
    {},
    {"num_null": 5},
    {"num_groups": 4, "groups_kept": 2},
    {"num_groups": 4, "groups_kept": 2, "group_rule": "max"},
    {"num_groups": 24, "groups_kept": 7},
]
# Of values of unit scale: a few units in the last place for float32, for gradients rounded to the logits' dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_inputs(dtype: torch.dtype, device: str, num_tokens: int = 37, num_experts: int = 24) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(num_tokens * num_experts)
    return {
        "logits_TE": (2 * torch.randn(num_tokens, num_experts, generator=random)).to(dtype).to(device),
        "bias_E": (0.1 * torch.randn(num_experts, generator=random, dtype=torch.float64)).to(device),
        "valid_T": (torch.rand(num_tokens, generator=random) > 0.2).to(device),
        "segment_T": torch.randint(0, 3, (num_tokens,), generator=random, dtype=torch.int32).to(device),
    }


def require_equal(got: Selection, wanted: Selection, tolerance: float) -> None:
    assert got.expert_id_TK.dtype == got.bad_1.dtype == torch.int32
    assert torch.equal(got.expert_id_TK, wanted.expert_id_TK)
    assert torch.equal(got.count_GE, wanted.count_GE)
    assert torch.equal(got.bad_1, wanted.bad_1)
    torch.testing.assert_close(got.weight_TK, wanted.weight_TK, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.prob_sum_GE, wanted.prob_sum_GE, rtol=tolerance, atol=tolerance)


def require_same_gradients(logits_TE: Tensor, top_k: int, options: dict[str, Any], tolerance: float) -> None:
    gradients = []
    for select in (select_experts, select_experts_reference):
        leaf_TE = logits_TE.detach().clone().requires_grad_()
        chosen = select(leaf_TE, top_k, **options)
        random = torch.Generator().manual_seed(1)
        dweight_TK = torch.randn(chosen.weight_TK.shape, generator=random).to(chosen.weight_TK)
        dprob_GE = torch.randn(chosen.prob_sum_GE.shape, generator=random).to(chosen.prob_sum_GE)
        torch.autograd.backward([chosen.weight_TK, chosen.prob_sum_GE], [dweight_TK, dprob_GE])
        gradients.append(leaf_TE.grad)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_equals_the_definition(
    device: str, score: Score, shape: dict[str, Any], renormalise: bool, biased: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs(dtype, device)
    options: dict[str, Any] = {"score": score, "renormalise": renormalise, "scale": 2.5, "num_segments": 3, **shape}
    options |= {"valid_T": inputs["valid_T"], "segment_T": inputs["segment_T"]}
    options |= {"bias_E": inputs["bias_E"]} if biased else {}
    got = select_experts(inputs["logits_TE"], 4, **options)
    wanted = select_experts_reference(inputs["logits_TE"], 4, **options)
    require_equal(got, wanted, min(TOLERANCE[dtype], 2e-6))
    assert got.count_GE.sum() == 4 * inputs["valid_T"].sum()
    require_same_gradients(inputs["logits_TE"], 4, options, TOLERANCE[dtype])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("sizes", [(0, 8, 2), (1, 1, 1), (1, 8, 8), (3, 7, 7), (600, 129, 8), (2, 1000, 40)], ids=str)
def test_odd_sizes(device: str, sizes: tuple[int, int, int], score: Score) -> None:
    num_tokens, num_experts, top_k = sizes
    logits_TE = make_inputs(torch.float32, device, num_tokens, num_experts)["logits_TE"]
    got = select_experts(logits_TE, top_k, score=score)
    require_equal(got, select_experts_reference(logits_TE, top_k, score=score), 2e-6)
    require_same_gradients(logits_TE, top_k, {"score": score}, 2e-6)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_ties_go_to_the_lower_id(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, num_experts))
    rows = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0]), min_size=num_experts, max_size=num_experts)
    logits_TE = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    score = data.draw(st.sampled_from(SCORES))
    expected = []
    for row in logits_TE.tolist():
        worth = {e: (-value, e) for e, value in enumerate(row)}
        expected.append(sorted(worth, key=worth.__getitem__)[:top_k])
    got = select_experts(logits_TE, top_k, score=score)
    assert got.expert_id_TK.tolist() == expected
    require_equal(got, select_experts_reference(logits_TE, top_k, score=score), 2e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, 4))
    num_experts = num_groups * data.draw(st.integers(1, 5))
    groups_kept = data.draw(st.integers(1, num_groups))
    top_k = data.draw(st.integers(1, groups_kept * num_experts // num_groups))
    inputs = make_inputs(torch.float64, "cpu", data.draw(st.integers(0, 9)), num_experts)
    options: dict[str, Any] = {
        "score": data.draw(st.sampled_from(SCORES)),
        "renormalise": data.draw(st.booleans()),
        "num_null": data.draw(st.integers(0, num_experts - 1)) if num_groups == 1 else 0,
        "num_groups": num_groups,
        "groups_kept": groups_kept,
        "group_rule": data.draw(st.sampled_from(["top2_sum", "max"])),
        "bias_E": data.draw(st.sampled_from([None, inputs["bias_E"]])),
        "valid_T": data.draw(st.sampled_from([None, inputs["valid_T"]])),
    }
    got = select_experts(inputs["logits_TE"], top_k, **options)
    require_equal(got, select_experts_reference(inputs["logits_TE"], top_k, **options), 1e-13)
    require_same_gradients(inputs["logits_TE"], top_k, options, 1e-13)


def test_a_wrong_result_is_caught(device: str) -> None:
    logits_TE = make_inputs(torch.float32, device)["logits_TE"]
    good = select_experts(logits_TE, 4)
    wrong = {
        "expert_id_TK": good.expert_id_TK.flip(1),
        "weight_TK": good.weight_TK * 1.0001,
        "prob_sum_GE": good.prob_sum_GE + 1e-4,
        "count_GE": good.count_GE.roll(1, 1),
        "bad_1": good.bad_1 + 1,
    }
    wanted = select_experts_reference(logits_TE, 4)
    require_equal(good, wanted, 2e-6)
    for field, value in wrong.items():
        with pytest.raises(AssertionError):
            require_equal(dataclasses.replace(good, **{field: value}), wanted, 2e-6)


def test_renormalised_softmax_is_softmax_of_the_chosen(device: str) -> None:
    logits_TE = make_inputs(torch.float32, device)["logits_TE"]
    first, second = (select_experts(logits_TE, 4, score=score) for score in SCORES[:2])
    assert torch.equal(first.weight_TK, second.weight_TK)
    assert torch.equal(first.expert_id_TK, second.expert_id_TK)


def test_extreme_logits_keep_their_order(device: str) -> None:
    logits_TE = torch.tensor([[-3e38, 3e38, -1000.0, -1001.0], [90.0, 91.0, 92.0, 93.0]], device=device)
    for score in SCORES:
        chosen = select_experts(logits_TE, 3, score=score)
        assert chosen.expert_id_TK.tolist() == [[1, 2, 3], [3, 2, 1]]
        assert chosen.weight_TK.isfinite().all()
        assert chosen.bad_1.item() == 0


def test_swapping_null_experts_changes_nothing_else(device: str) -> None:
    logits_TE = make_inputs(torch.float64, device)["logits_TE"]
    swapped_TE = torch.cat([logits_TE[:, :16], logits_TE[:, 16:].flip(1)], 1)
    first, second = (select_experts(x, 6, num_null=8) for x in (logits_TE, swapped_TE))
    assert torch.equal(first.expert_id_TK, second.expert_id_TK)
    torch.testing.assert_close(first.weight_TK, second.weight_TK, rtol=1e-14, atol=1e-14)
    assert torch.equal(first.count_GE[:, 16:], second.count_GE[:, 16:].flip(1))
    assert first.expert_id_TK.lt(16).all()


def test_a_token_whose_choices_are_all_null(device: str) -> None:
    logits_TE = torch.tensor([[0.0, 0.0, 5.0, 5.0]], device=device, requires_grad=True)
    for score in SCORES:
        chosen = select_experts(logits_TE, 2, score=score, num_null=2)
        assert chosen.expert_id_TK.tolist() == [[-1, -1]]
        assert chosen.weight_TK.tolist() == [[0.0, 0.0]]
        assert chosen.count_GE.tolist() == [[0, 0, 1, 1]]
        (dlogits_TE,) = torch.autograd.grad(chosen.weight_TK.sum(), logits_TE)
        assert dlogits_TE.tolist() == [[0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_is_flagged_and_left_out(device: str, bad: float) -> None:
    logits_TE = make_inputs(torch.float32, device)["logits_TE"]
    broken_TE = logits_TE.clone()
    broken_TE[5, 3] = bad
    without_T = torch.arange(len(logits_TE), device=device) != 5
    got = select_experts(broken_TE, 4)
    require_equal(
        dataclasses.replace(got, bad_1=got.bad_1 - 1), select_experts_reference(logits_TE, 4, valid_T=without_T), 2e-6
    )
    assert got.bad_1.item() == 1
    assert select_experts(broken_TE, 4, valid_T=without_T).bad_1.item() == 0
    require_same_gradients(broken_TE, 4, {}, 2e-6)


def test_a_bias_that_is_not_finite_is_flagged(device: str) -> None:
    inputs = make_inputs(torch.float32, device)
    inputs["bias_E"][2] = float("nan")
    got = select_experts(inputs["logits_TE"], 4, bias_E=inputs["bias_E"])
    assert got.bad_1.item() == 1
    assert got.expert_id_TK.eq(-1).all()


def test_the_number_of_threads_changes_nothing() -> None:
    inputs = make_inputs(torch.float32, "cpu", 3000, 60)
    inputs["logits_TE"].requires_grad_()
    options: dict[str, Any] = {key: inputs[key] for key in ("valid_T", "segment_T")} | {"num_segments": 3}
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            got = select_experts(inputs["logits_TE"], 4, **options)
            loss = got.weight_TK.square().sum() + got.prob_sum_GE.square().sum()
            results.append((got, torch.autograd.grad(loss, inputs["logits_TE"])[0]))
    finally:
        torch.set_num_threads(before)
    (first, first_gradient), *others = results
    for got, gradient in others:
        require_equal(got, first, 0.0)
        assert torch.equal(gradient, first_gradient)


def test_rows_may_be_apart(device: str) -> None:
    wide_TE = make_inputs(torch.float32, device, 20, 48)["logits_TE"]
    require_equal(select_experts(wide_TE[:, 8:32], 4), select_experts_reference(wide_TE[:, 8:32], 4), 2e-6)
    require_same_gradients(wide_TE[::2, :24], 4, {}, 2e-6)


@pytest.mark.parametrize("score", SCORES)
def test_gradient_in_float64(device: str, score: Score) -> None:
    inputs = make_inputs(torch.float64, device, 6, 8)
    inputs["logits_TE"].requires_grad_()

    def differentiable(logits_TE: Tensor, renormalise: bool) -> tuple[Tensor, Tensor]:
        chosen = select_experts(
            logits_TE, 3, score=score, renormalise=renormalise, num_null=2, bias_E=inputs["bias_E"], scale=1.5,
            valid_T=inputs["valid_T"], segment_T=inputs["segment_T"], num_segments=3,
        )  # fmt: skip
        return chosen.weight_TK, chosen.prob_sum_GE

    for renormalise in (False, True):
        assert torch.autograd.gradcheck(partial(differentiable, renormalise=renormalise), (inputs["logits_TE"],))


def test_gradients_of_one_output_alone_and_expanded(device: str) -> None:
    logits_TE = make_inputs(torch.float64, device)["logits_TE"].requires_grad_()
    chosen = select_experts(logits_TE, 4, score="sigmoid", renormalise=False)
    (from_sum,) = torch.autograd.grad(chosen.weight_TK.sum(), logits_TE)  # an expanded gradient, of stride 0
    wanted_TE = torch.zeros_like(logits_TE).scatter(1, chosen.expert_id_TK.long(), 1.0)
    sigmoid_TE = logits_TE.sigmoid()
    torch.testing.assert_close(from_sum, wanted_TE * sigmoid_TE * (1 - sigmoid_TE), rtol=1e-13, atol=1e-13)


def test_registration(device: str) -> None:
    inputs = make_inputs(torch.float64, device)
    logits_TE = inputs["logits_TE"].requires_grad_()
    args = (logits_TE, 4, "sigmoid", inputs["bias_E"], 0, 4, 2, "max", True, 2.5, inputs["valid_T"])
    # opcheck's own run through AOTAutograd adds a float output to an int one in place; see the next test.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.moetrain.select_experts.default
    torch.library.opcheck(op, (*args, inputs["segment_T"], 3), test_utils=checks)
    chosen = select_experts(logits_TE.detach(), 4)
    gradients = (torch.randn_like(chosen.weight_TK), torch.randn_like(chosen.prob_sum_GE))
    backward_args = (*gradients, logits_TE.detach(), chosen.expert_id_TK, "softmax", 0, True, 1.0, None, None)
    torch.library.opcheck(torch.ops.moetrain.select_experts_backward.default, backward_args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_through_aot_autograd(device: str, dynamic: bool) -> None:
    def loss_of(logits_TE: Tensor) -> tuple[Tensor, Selection]:
        chosen = select_experts(logits_TE, 4, score="sigmoid")
        return chosen.weight_TK.square().sum() + chosen.prob_sum_GE.square().sum(), chosen

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for num_tokens in (37, 5):
        logits_TE = make_inputs(torch.float64, device, num_tokens)["logits_TE"].requires_grad_()
        loss, chosen = compiled(logits_TE)
        wanted_loss, wanted = loss_of(logits_TE)
        require_equal(chosen, wanted, 0.0)
        assert torch.equal(*(torch.autograd.grad(each, logits_TE)[0] for each in (loss, wanted_loss)))


LOGITS = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"logits_TE": torch.zeros(8)}, ValueError, r"logits must be \[T, E\] with E >= 1, got \[8\]"),
        ({"logits_TE": torch.zeros(3, 0)}, ValueError, r"logits must be \[T, E\] with E >= 1, got \[3, 0\]"),
        ({"logits_TE": LOGITS.int()}, TypeError, "logits must be float32, bfloat16, float16 or float64, got Int"),
        ({"logits_TE": torch.zeros(8, 3).T}, ValueError, "the last dimension of logits must have stride 1, got sizes"),
        ({"top_k": 0}, ValueError, r"top_k must be between 1 and 8 \(experts within the groups kept\), got 0"),
        ({"top_k": 9}, ValueError, "top_k must be between 1 and 8 .*, got 9"),
        ({"top_k": 5, "num_groups": 4, "groups_kept": 2}, ValueError, "top_k must be between 1 and 4 .*, got 5"),
        ({"score": "softmix"}, ValueError, "score must be 'softmax', .* got 'softmix'"),
        ({"group_rule": "min"}, ValueError, "group_rule must be 'top2_sum' or 'max', got 'min'"),
        ({"num_groups": 3}, ValueError, r"num_groups \(3\) must be at least 1 and divide the number of experts \(8\)"),
        ({"num_groups": 2, "groups_kept": 3}, ValueError, r"groups_kept must be between 1 and num_groups \(2\), got 3"),
        ({"num_null": 8}, ValueError, "num_null must be between 0 and E - 1 = 7, got 8"),
        ({"num_null": 1, "num_groups": 2}, ValueError, r"num_null \(1\) and num_groups \(2\) do not go together"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"num_segments": 0}, ValueError, "num_segments must be at least 1, got 0"),
        ({"num_segments": 2}, ValueError, "num_segments is 2 but there is no segment"),
        ({"bias_E": torch.zeros(7)}, ValueError, r"bias must be \[E\] = \[8\], got \[7\]"),
        ({"bias_E": torch.zeros(8).int()}, TypeError, "bias must be float32, .* got Int"),
        ({"valid_T": torch.ones(3)}, TypeError, "valid must be Bool, got Float"),
        ({"valid_T": torch.ones(2).bool()}, ValueError, r"valid must be \[T\] = \[3\], got \[2\]"),
        ({"valid_T": torch.ones(6).bool()[::2]}, ValueError, "valid must be contiguous"),
        ({"segment_T": torch.zeros(3)}, TypeError, "segment must be Int, got Float"),
        ({"segment_T": torch.zeros(4).int()}, ValueError, r"segment must be \[T\] = \[3\], got \[4\]"),
        (
            {"segment_T": torch.tensor([0, 2, 0]).int(), "num_segments": 2},
            ValueError,
            r"segments must be in \[0, 2\), got 2 at token 1; raise num_segments",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"logits_TE": LOGITS, "top_k": 2, **arguments}
    with pytest.raises(error, match=f"select_experts: {text}"):
        select_experts(**given)


def test_a_segment_of_a_token_that_is_not_valid_is_not_read() -> None:
    valid_T = torch.tensor([True, False, True])
    chosen = select_experts(LOGITS, 2, valid_T=valid_T, segment_T=torch.tensor([0, -7, 0]).int())
    assert chosen.count_GE.sum() == 4


def test_backward_refuses_ids_that_are_no_experts() -> None:
    chosen = select_experts(LOGITS, 2)
    args = (chosen.weight_TK, chosen.prob_sum_GE, LOGITS, chosen.expert_id_TK + 7, "softmax", 0, True, 1.0, None, None)
    with pytest.raises(ValueError, match=r"expert ids must be -1 or in \[0, 8\), got 8 at position 1"):
        torch.ops.moetrain.select_experts_backward(*args)


@pytest.mark.parametrize("function", [select_experts, select_experts_reference, route])
def test_an_option_that_there_is_not_is_refused_by_name(function: Any) -> None:
    with pytest.raises(TypeError, match="unknown option 'num_nul'; did you mean 'num_null'"):
        function(LOGITS, 2, num_nul=1)
