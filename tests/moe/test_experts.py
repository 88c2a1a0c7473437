from dataclasses import replace

import pytest
import torch
from moe import reference
from moe.helpers import WIDTH, expert_weights, integer_routing, make_moe, make_params, relative_error
from torch import Tensor

from moetrain.moe import Routing, SharedExpert, activate, run_experts

ACTIVATIONS = ["swiglu", "gelu", "relu2"]


def _loops(x_RD: Tensor, routing: Routing, params: dict[str, Tensor], activation: str) -> Tensor:
    rows = [torch.zeros(WIDTH, dtype=x_RD.dtype) for _ in range(len(x_RD))]
    offsets = routing.offset_E1.tolist()
    for e in range(routing.num_experts):
        for n in range(offsets[e], offsets[e + 1]):
            r = int(routing.token_N[n])
            out_D = reference.expert(x_RD[r], params["w_in"][e], params["w_out"][e], activation)
            rows[r] = rows[r] + routing.weight_N[n] * out_D
    return torch.stack(rows)


def _run(
    x_RD: Tensor, routing: Routing, params: dict[str, Tensor], activation: str
) -> tuple[Tensor, dict[str, Tensor]]:
    weights = expert_weights(params)
    y_RD = run_experts(x_RD, routing.token_N, routing.weight_N, routing.offset_E1, weights, activation)  # type: ignore[arg-type]
    y_RD.backward(torch.linspace(-1, 2, y_RD.numel(), dtype=y_RD.dtype).round(decimals=1).view_as(y_RD))
    slot = weights.slot_E.long()
    return y_RD, {"w_in": weights.w_in.grad[slot], "w_out": weights.w_out.grad[slot]}  # type: ignore[index]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_loops_over_pairs_with_every_gradient(activation: str) -> None:
    config = make_moe(activation=activation)
    params = make_params(config)
    x_RD = torch.randn(9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    routing = integer_routing(9, config.moe.num_experts, 2, seed=1)
    routing = replace(routing, weight_N=torch.linspace(-1, 1, 18, dtype=torch.float64).requires_grad_())
    y_RD, grads = _run(x_RD, routing, params, activation)
    mine = {"x": x_RD.grad, "weight": routing.weight_N.grad, **grads}
    x_RD.grad = routing.weight_N.grad = None
    expected_RD = _loops(x_RD, routing, params, activation)
    expected_RD.backward(torch.linspace(-1, 2, y_RD.numel(), dtype=y_RD.dtype).round(decimals=1).view_as(y_RD))
    theirs = {
        "x": x_RD.grad,
        "weight": routing.weight_N.grad,
        "w_in": params["w_in"].grad,
        "w_out": params["w_out"].grad,
    }
    assert relative_error(y_RD, expected_RD) <= 1e-11
    for name, grad in theirs.items():
        assert relative_error(mine[name], grad) <= 1e-11, name  # type: ignore[arg-type]
    wrong = _loops(x_RD, replace(routing, weight_N=routing.weight_N * (1 + 1e-9)), params, activation)
    assert relative_error(y_RD, wrong) > 1e-11


def _whole(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float().round().requires_grad_() for name, value in params.items()}


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_small_whole_numbers_are_exact_to_the_bit(top_k: int) -> None:
    config = make_moe(activation="relu2", num_experts=5, top_k=top_k)
    params = _whole(make_params(config))
    x_RD = torch.randint(-2, 3, (7, WIDTH), generator=torch.Generator().manual_seed(3)).float()
    routing = integer_routing(7, 5, top_k, seed=2)
    y_RD, _ = _run(x_RD.requires_grad_(), routing, params, "relu2")
    expected_RD = _loops(x_RD, routing, params, "relu2")
    assert torch.equal(y_RD, expected_RD)
    dropped = replace(routing, offset_E1=torch.cat((routing.offset_E1[:-1], routing.offset_E1[-1:] - 1)))
    assert not torch.equal(y_RD, _loops(x_RD, dropped, params, "relu2")), "a dropped pair must show"


def test_a_row_adds_its_experts_in_ascending_order() -> None:
    config = make_moe(num_experts=3, top_k=3, activation="relu2", expert_width=1)
    params = {
        "w_in": torch.eye(1, WIDTH).expand(3, 1, 1, WIDTH).clone().requires_grad_(),
        "w_out": torch.ones(3, WIDTH, 1).requires_grad_(),
    }
    big = 2.0**30
    for weights, expected in (([big, -big, 1.0], 1.0), ([1.0, big, -big], 0.0)):
        routing = replace(integer_routing(1, 3, 3, seed=0), weight_N=torch.tensor(weights))
        x_RD = torch.ones(1, WIDTH)
        y_RD = run_experts(
            x_RD, routing.token_N, routing.weight_N, routing.offset_E1, expert_weights(params), config.moe.activation
        )
        assert y_RD.detach().flatten().tolist() == [expected] * WIDTH


def test_rows_without_pairs_are_zero_and_the_tail_is_ignored() -> None:
    config = make_moe()
    params = make_params(config)
    routing = Routing(
        token_N=torch.tensor([1, 1, 77], dtype=torch.int32),
        weight_N=torch.tensor([2.0, 3.0, float("nan")], dtype=torch.float64).requires_grad_(),
        offset_E1=torch.tensor([0, 1, 1, 1, 1, 1, 2], dtype=torch.int32),
        token_gid_T2=torch.zeros(3, 2, dtype=torch.int64),
        num_tokens=3,
    )
    x_RD = torch.ones(3, WIDTH, dtype=torch.float64, requires_grad=True)
    y_RD, grads = _run(x_RD, routing, params, "swiglu")
    assert relative_error(y_RD, _loops(x_RD, routing, params, "swiglu")) <= 1e-11
    assert not y_RD[[0, 2]].any()
    assert not grads["w_in"][1:5].any(), "empty experts get a gradient of zeros"
    assert grads["w_in"][0].any()
    assert routing.weight_N.grad is not None
    assert routing.weight_N.grad[2] == 0


def test_no_rows_and_no_experts_still_give_gradients() -> None:
    config = make_moe()
    params = make_params(config)
    for experts, rows in (((), 0), ((0, 1), 0), ((), 2)):
        weights = expert_weights(params, experts)
        x_RD = torch.ones(rows, WIDTH, dtype=torch.float64, requires_grad=True)
        weight_N = torch.zeros(0, dtype=torch.float64, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int32)
        offset_e1 = torch.zeros(len(experts) + 1, dtype=torch.int32)
        y_RD = run_experts(x_RD, none, weight_N, offset_e1, weights, "swiglu")
        assert y_RD.shape == (rows, WIDTH)
        y_RD.sum().backward()
        for tensor in (x_RD, weight_N, weights.w_in, weights.w_out):
            assert tensor.grad is not None
            assert not tensor.grad.any()


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="activation must be 'swiglu', 'gelu' or 'relu2', got 'tanh'"):
        activate(torch.zeros(1, 2), "tanh")  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", [False, True])
def test_shared_expert_equals_the_definition(activation: str, gate: bool) -> None:
    config = make_moe(activation=activation, shared_width=4, shared_gate=gate)
    params = make_params(config)
    shared = SharedExpert(WIDTH, 4, activation, gate=gate).double()  # type: ignore[arg-type]
    x_TD = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert not shared(x_TD).any(), "parameters are zero until filled"
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            parameter.copy_(params[f"shared.{name}"])
    gates_T = torch.sigmoid(x_TD @ params["shared.gate"][0]) if gate else torch.ones(3)
    for x_D, y_D, g in zip(x_TD, shared(x_TD), gates_T, strict=True):
        expected_D = g * reference.expert(x_D, params["shared.w_in"], params["shared.w_out"], activation)
        assert relative_error(y_D, expected_D) <= 1e-11
