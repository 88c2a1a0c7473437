"""Shapes: S tokens of a document, T tokens, D width, F hidden width, H heads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_configs import layer_config
from torch import Tensor
from torch.nn import functional

from moetrain.config import ModelConfig, MoELayerConfig
from moetrain.oracle import BalanceInputs, Document, MicroBatch, loss_terms, parameter_shapes, random_parameters
from moetrain.oracle import model as oracle_model

MODEL = ModelConfig(
    vocab_size=11,
    num_layers=2,
    dense_first=1,
    dense_width=5,
    width=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qk_norm=True,
    qkv_bias=True,
)
MOE = layer_config(num_experts=3, top_k=2, expert_width=4, num_shared_experts=1, shared_gate=True, z_loss_coef=0.1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def document(length: int, seed: int) -> Document:
    generator = torch.Generator().manual_seed(seed)
    token_id_S, target_S = (torch.randint(0, 11, (length,), generator=generator) for _ in range(2))
    target_S[::3] = -1
    return Document(token_id_S, target_S, torch.arange(length))


def still(config: MoELayerConfig = MOE, model: ModelConfig = MODEL) -> BalanceInputs:
    layers = model.moe_layers
    return BalanceInputs(
        {layer: torch.zeros(config.moe.num_experts, dtype=torch.int64) for layer in layers},
        {layer: torch.zeros(config.moe.num_experts, dtype=torch.float64) for layer in layers},
    )


def total(
    params: dict[str, Tensor], batch: MicroBatch, config: MoELayerConfig = MOE, model: ModelConfig = MODEL
) -> Tensor:
    terms = loss_terms(params, model, config, batch, still(config, model), 7)
    return terms.ce_sum + terms.aux


def test_rms_norm_by_hand() -> None:
    y = oracle_model.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_rotary_turns_pairs_half_a_head_apart_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]], dtype=torch.float64)
    y = oracle_model.rotate(x, torch.tensor([2, 2]), theta=100.0)
    slow, fast = torch.tensor(0.2).double(), torch.tensor(2.0).double()  # frequencies 1 and 100^(-1/2)
    expected = torch.stack(
        [
            torch.stack([fast.cos(), fast * 0, fast.sin(), fast * 0]),
            torch.stack([slow * 0, slow.cos(), slow * 0, slow.sin()]),
        ]
    )
    torch.testing.assert_close(y[:, 0], expected, rtol=1e-7, atol=1e-8)


def reference_attention(params: dict[str, Tensor], x_SD: Tensor) -> Tensor:
    """The same attention from torch's fused parts, with complex numbers for the rotation."""

    def heads(name: str) -> Tensor:
        y = functional.linear(x_SD, params[f"a.{name}.weight"], params[f"a.{name}.bias"])
        return y.view(len(x_SD), -1, 4).transpose(0, 1)

    def turned(x_HSd: Tensor) -> Tensor:
        frequency = torch.tensor([1.0, MODEL.rope_theta**-0.5], dtype=torch.float64)
        turn = torch.polar(torch.ones(()).double(), torch.arange(len(x_SD)).double()[:, None] * frequency)
        turned = torch.complex(x_HSd[..., :2], x_HSd[..., 2:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    query, key, value = heads("q"), heads("k"), heads("v")
    query = turned(functional.rms_norm(query, (4,), params["a.q_norm.weight"], MODEL.norm_eps))
    key = turned(functional.rms_norm(key, (4,), params["a.k_norm.weight"], MODEL.norm_eps))
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return functional.linear(out.transpose(0, 1).flatten(1), params["a.o.weight"])


def check_attention() -> None:
    shapes = {name.removeprefix("layers.0.attn."): shape for name, shape in parameter_shapes(MODEL, MOE.moe).items()}
    params = {f"a.{name}": normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    x_SD = normal(9, 6)
    actual = oracle_model.attention(params, "a", MODEL, x_SD, torch.arange(9))
    torch.testing.assert_close(actual, reference_attention(params, x_SD), rtol=1e-12, atol=1e-12)


def test_attention_equals_torch() -> None:
    check_attention()


RIGHT = {"rotate": oracle_model.rotate}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rotate", lambda x, position_S, theta: x),
        ("rotate", lambda x, position_S, theta: RIGHT["rotate"](x, -position_S, theta * 2)),
        ("rms_norm", lambda x, weight, eps: x * weight),
    ],
)
def test_a_wrong_attention_would_be_noticed(
    name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_model, name, wrong)
    with pytest.raises(AssertionError):
        check_attention()


@pytest.mark.parametrize(
    ("activation", "reference"),
    [
        ("swiglu", lambda x, w: functional.silu(x @ w[0].T) * (x @ w[1].T)),
        ("gelu", lambda x, w: functional.gelu(x @ w[0].T)),
        ("relu2", lambda x, w: functional.relu(x @ w[0].T) ** 2),
    ],
)
def test_activations_equal_torch(activation: str, reference: Callable[..., Any]) -> None:
    x_TD, w_in, w_out = normal(7, 6), normal(2, 4, 6, seed=1), normal(6, 4, seed=2)
    expected = reference(x_TD, w_in) @ w_out.T
    torch.testing.assert_close(oracle_model.mlp(x_TD, w_in, w_out, activation), expected, rtol=1e-12, atol=1e-12)


def test_cross_entropy_equals_torch_and_ignores_what_has_no_target() -> None:
    logit_TV, target_T = normal(6, 11), torch.tensor([1, -1, 3, 10, -1, 0])
    expected = functional.cross_entropy(logit_TV, target_T, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(oracle_model.cross_entropy_sum(logit_TV, target_T), expected)
    assert float(oracle_model.cross_entropy_sum(logit_TV, torch.full((6,), -1))) == 0.0


def test_experts_are_the_weighted_sum_over_chosen_ones_plus_the_shared_one() -> None:
    params = random_parameters(MODEL, MOE.moe, seed=1, dtype=torch.float64)
    x_TD = normal(2, 6)
    weight_TE = torch.tensor([[0.25, 0.0, 0.75], [0.0, 2.0, 0.0]], dtype=torch.float64)
    y_TD = oracle_model.experts(params, "layers.1.moe", MOE.moe, x_TD, weight_TE)

    def one(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return w_out @ (functional.silu(w_in[0] @ x) * (w_in[1] @ x))

    w_in, w_out = (params[f"layers.1.moe.experts.{name}"] for name in ("w_in", "w_out"))
    shared = [params[f"layers.1.moe.shared.{name}"] for name in ("w_in", "w_out", "gate")]
    gated_TD = [torch.sigmoid(shared[2] @ x) * one(x, shared[0], shared[1]) for x in x_TD]
    first = 0.25 * one(x_TD[0], w_in[0], w_out[0]) + 0.75 * one(x_TD[0], w_in[2], w_out[2])
    second = 2 * one(x_TD[1], w_in[1], w_out[1])
    torch.testing.assert_close(y_TD, torch.stack([first + gated_TD[0], second + gated_TD[1]]))


def test_documents_do_not_see_one_another() -> None:
    params = random_parameters(MODEL, MOE.moe, seed=1, dtype=torch.float64)
    first, second = document(5, 1), document(4, 2)
    together = total(params, MicroBatch((first, second)))
    apart = total(params, MicroBatch((first,))) + total(params, MicroBatch((second,)))
    torch.testing.assert_close(together, apart, rtol=1e-13, atol=1e-13)


def test_a_token_sees_none_that_come_later() -> None:
    params = random_parameters(MODEL, MOE.moe, seed=1, dtype=torch.float64)
    whole = document(8, 3)
    whole.target_S[5:] = -1
    cut = Document(whole.token_id_S[:5], whole.target_S[:5], whole.position_S[:5])
    terms = [loss_terms(params, MODEL, MOE, MicroBatch((d,)), still(), 1).ce_sum for d in (whole, cut)]
    torch.testing.assert_close(terms[0], terms[1], rtol=1e-13, atol=1e-13)


def test_only_distances_between_positions_matter() -> None:
    params = random_parameters(MODEL, MOE.moe, seed=1, dtype=torch.float64)
    here = document(6, 4)
    there = Document(here.token_id_S, here.target_S, here.position_S + 13)
    torch.testing.assert_close(total(params, MicroBatch((here,))), total(params, MicroBatch((there,))))


def test_no_document_costs_nothing() -> None:
    params = random_parameters(MODEL, MOE.moe, seed=1, dtype=torch.float64)
    terms = loss_terms(params, MODEL, MOE, MicroBatch(()), still(), 7)
    assert (float(terms.ce_sum), float(terms.aux)) == (0.0, 0.0)
    assert {layer: count.tolist() for layer, count in terms.count_E.items()} == {1: [0, 0, 0]}


def test_micro_balance_depends_on_what_is_in_the_micro_batch() -> None:
    config = layer_config(num_experts=3, top_k=1, expert_width=4, balance_scope="micro", balance_coef=1.0)
    params = random_parameters(MODEL, config.moe, seed=1, dtype=torch.float64)
    first, second = document(5, 1), document(4, 2)
    together = total(params, MicroBatch((first, second)), config)
    apart = total(params, MicroBatch((first,)), config) + total(params, MicroBatch((second,)), config)
    assert abs(float(together - apart)) > 1e-3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        MOE,
        layer_config(num_experts=4, top_k=2, expert_width=3, score="sigmoid", weight_scale=2.5, activation="gelu"),
        layer_config(num_experts=4, top_k=4, expert_width=3, score="softmax", renormalise=False, balance_scope="micro"),
        layer_config(num_experts=4, top_k=1, expert_width=3, score="topk_softmax", activation="relu2"),
    ],
    ids=["shared", "sigmoid", "all", "relu2"],
)
def test_gradients_equal_finite_differences(config: MoELayerConfig, tied: bool) -> None:
    model = ModelConfig(
        vocab_size=11, num_layers=1, width=6, num_heads=2, num_kv_heads=1, head_dim=2, tie_embeddings=tied
    )
    params = random_parameters(model, config.moe, seed=5, dtype=torch.float64)
    names = list(params)
    batch = MicroBatch((document(4, 1), document(1, 2), document(3, 3)))

    def loss(*values: Tensor) -> Tensor:
        return total(dict(zip(names, values, strict=True)), batch, config, model)

    inputs = tuple(params[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-6, fast_mode=True)


def test_every_parameter_gets_a_gradient() -> None:
    params = random_parameters(MODEL, MOE.moe, seed=5, dtype=torch.float64)
    for value in params.values():
        value.requires_grad_()
    total(params, MicroBatch((document(8, 1), document(7, 2)))).backward()
    zero = [name for name, value in params.items() if value.grad is None or float(value.grad.abs().max()) == 0]
    assert zero == []
    assert params.keys() == parameter_shapes(MODEL, MOE.moe).keys()
