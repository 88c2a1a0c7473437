from typing import Any

import pytest
import torch
from moe import reference
from moe.helpers import WIDTH, context, gradients, make_layer, make_moe, make_params, relative_error, tokens

from moetrain.moe import LocalDispatcher, MoEContext

CASES: list[dict[str, Any]] = [
    {},
    {"score": "sigmoid", "weight_scale": 2.5, "activation": "relu2"},
    {"score": "topk_softmax", "activation": "gelu", "balance_scope": "micro"},
    {"renormalise": False, "balance_scope": "none"},
    {"top_k": 1, "shared_width": 3},
    {"top_k": 6, "num_shared_experts": 2, "shared_gate": True},
    {"num_experts": 7, "top_k": 3},
    {"num_experts": 1, "top_k": 1},
    {"score": "sigmoid", "loss_free": True, "bias_rate": 0.2},
]


def _errors(changes: dict[str, Any], num_tokens: int, dtype: torch.dtype, spoil: float = 1.0) -> dict[str, float]:
    """Largest relative error of every output and gradient; ``spoil`` scales the layer's expert output weights."""
    config = make_moe(**changes)
    params = make_params(config, dtype)
    layer, weights, balance = make_layer(config, params)
    balance[3].add(torch.arange(config.moe.num_experts))
    balance.finish_step(lambda x: x)
    with torch.no_grad():
        weights.w_out.mul_(spoil)
    x_TD = tokens(num_tokens, dtype)
    valid = [t % 4 != 2 for t in range(num_tokens)] if num_tokens > 1 else [True] * num_tokens
    y_TD, aux = layer(x_TD, context(num_tokens, valid=valid, step=20))
    pull_TD = torch.linspace(-1, 1.7, y_TD.numel(), dtype=dtype).view_as(y_TD)
    ((y_TD * pull_TD).sum() + 3 * aux).backward()
    mine = {"y": y_TD, "aux": aux, "dx": x_TD.grad, **gradients(layer, weights)}
    x_TD.grad = None
    expected_TD, expected_aux, count_E = reference.layer(
        x_TD,
        params,
        config,
        valid=valid,
        num_step_tokens=20,
        share_E=balance[3].share(),
        bias_E=balance[3].selection_bias(),
    )
    ((expected_TD * pull_TD).sum() + 3 * expected_aux).backward()
    theirs: dict[str, Any] = {"y": expected_TD, "aux": expected_aux, "dx": x_TD.grad} | {
        n: p.grad for n, p in params.items()
    }
    if num_tokens == 0:
        theirs |= {name: torch.zeros_like(p) for name, p in params.items()}
    assert balance.finish_step(lambda x: x).count_LE[0].tolist() == count_E.tolist()
    scale = max(float(g.detach().abs().max()) for g in theirs.values() if g is not None and g.numel())
    errors = {}
    for name, value in theirs.items():
        difference = (mine[name] - value).detach().abs()
        bound = max(float(value.detach().abs().max()), 0.01 * scale) if value.numel() else 1.0
        errors[name] = float(difference.max()) / max(bound, 1e-300) if value.numel() else 0.0
    return errors


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("num_tokens", [9, 1])
def test_equals_the_loops_in_float64(changes: dict[str, Any], num_tokens: int) -> None:
    errors = _errors(changes, num_tokens, torch.float64)
    assert max(errors.values()) <= 1e-11, errors


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_equals_the_loops_in_float32(changes: dict[str, Any]) -> None:
    errors = _errors(changes, 9, torch.float32)
    assert max(errors.values()) <= 1e-5, errors


def test_a_scaled_expert_fails_the_comparison() -> None:
    errors = _errors({}, 9, torch.float64, spoil=1 + 1e-9)
    assert errors["y"] > 1e-11
    assert errors["router"] > 1e-11


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_no_tokens_give_zero_gradients_everywhere(changes: dict[str, Any]) -> None:
    assert max(_errors(changes, 0, torch.float64).values()) == 0.0
    config = make_moe(**changes)
    layer, weights, _ = make_layer(config, make_params(config))
    y_TD, aux = layer(tokens(0), context(0, step=20))
    (y_TD.sum() + aux).backward()
    assert y_TD.shape == (0, WIDTH)
    for tensor in (*layer.parameters(), weights.w_in, weights.w_out):
        assert tensor.grad is not None, "a rank with nothing to do stays in the graph"
        assert not tensor.grad.any()


def test_all_tokens_may_choose_one_expert() -> None:
    config = make_moe(top_k=1, activation="relu2")
    params = make_params(config)
    with torch.no_grad():
        params["router"].zero_()  # all logits equal: the lowest id wins every tie
    layer, weights, balance = make_layer(config, params)
    x_TD = tokens(8)
    y_TD, aux = layer(x_TD, context(8))
    y_TD.sum().backward()
    expected_TD, _, count_E = reference.layer(x_TD, params, config, valid=[True] * 8, num_step_tokens=8)
    assert count_E.tolist() == [8, 0, 0, 0, 0, 0]
    assert relative_error(y_TD, expected_TD) <= 1e-12
    report = balance.finish_step(lambda x: x)
    assert report.max_vio == (5.0,)
    grads = gradients(layer, weights)
    assert grads["w_in"][0].any()
    assert not grads["w_in"][1:].any()
    assert torch.isfinite(aux)


def test_evaluation_is_not_counted() -> None:
    config = make_moe()
    layer, _, balance = make_layer(config, make_params(config))
    layer(tokens(5), context(5, training=False))
    assert not balance.finish_step(lambda x: x).count_LE.any()
    layer(tokens(5), context(5))
    assert int(balance.finish_step(lambda x: x).count_LE.sum()) == 10


def test_bf16_stays_bf16_and_close_to_float32() -> None:
    config = make_moe(shared_width=4, shared_gate=True)
    params = make_params(config, torch.bfloat16)
    layer, weights, _ = make_layer(config, params)
    x_TD = tokens(9, torch.bfloat16)
    y_TD, aux = layer(x_TD, context(9))
    y_TD.float().sum().backward()
    assert y_TD.dtype == torch.bfloat16
    assert aux.dtype == torch.float32
    assert weights.w_in.grad is not None
    wide = {name: p.detach().float() for name, p in params.items()}
    expected_TD, _, _ = reference.layer(x_TD.detach().float(), wide, config, valid=[True] * 9, num_step_tokens=9)
    assert relative_error(y_TD, expected_TD) <= 2e-2


def _saved_bytes(changes: dict[str, Any]) -> tuple[int, dict[str, torch.Tensor]]:
    """What the backward pass keeps, and the gradients."""
    config = make_moe(**changes)
    layer, weights, _ = make_layer(config, make_params(config))
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_TD, aux = layer(tokens(9), context(9))
    (y_TD.square().sum() + aux).backward()
    return sum(saved.values()), gradients(layer, weights)


def test_recomputing_hidden_saves_them_alone_and_changes_no_bit() -> None:
    kept, grads = _saved_bytes({})
    lean, same_grads = _saved_bytes({"recompute_hidden": True})
    assert kept - lean == 9 * 2 * 64 * 8, "of each pair, one block of 64 columns in float64"
    for name, grad in grads.items():
        assert grad.any()
        assert torch.equal(same_grads[name], grad), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_name_layer_and_rank(bad: float) -> None:
    config = make_moe()
    layer, _, _ = make_layer(config, make_params(config), dispatcher=LocalDispatcher(6, rank=11))
    x_TD = tokens(5).detach()
    x_TD[0, 0] = bad
    with pytest.raises(FloatingPointError, match=r"MoE layer 3: router logits hold NaN or Inf on rank\(s\) \[11\]"):
        layer(x_TD, context(5))


def test_padding_may_hold_anything_finite_without_changing_other_rows() -> None:
    config = make_moe()
    layer, _, _ = make_layer(config, make_params(config))
    x_TD = tokens(4).detach()
    ctx: MoEContext = context(4, valid=[True, False, True, True], step=3)
    before_TD, before_aux = layer(x_TD, ctx)
    x_TD[1] = 1e3
    after_TD, after_aux = layer(x_TD, ctx)
    assert torch.equal(before_TD[[0, 2, 3]], after_TD[[0, 2, 3]])
    assert torch.equal(before_aux, after_aux)
    assert not after_TD[1].any()


def test_a_dispatcher_of_another_size_is_refused() -> None:
    config = make_moe()
    layer, _, _ = make_layer(config, make_params(config), dispatcher=LocalDispatcher(8))
    with pytest.raises(ValueError, match="routing is over 6 experts, but this dispatcher serves 8"):
        layer(tokens(2), context(2))
