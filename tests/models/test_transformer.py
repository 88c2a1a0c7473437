"""Whole models against the oracle, in float64, and what must not change anything."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from layer_configs import layer_config
from models.whole import MODEL, MOE, documents_of, largest_error, load, make_batch, one_process_model, whole_values
from torch import Tensor

from moetrain.config import ModelConfig, MoELayerConfig, preset
from moetrain.models.transformer import Transformer
from moetrain.moe.layer import LayerServices, MoELayer
from moetrain.oracle import loss_terms, random_parameters
from moetrain.oracle.model import BalanceInputs
from moetrain.placement.chunks import ExpertShape
from moetrain.sequence.batch import PackedBatch, Piece

Result = tuple[Tensor, Tensor, dict[str, Tensor]]

VARIANTS = {
    "everything": (MODEL, MOE),
    "tied, gelu, sigmoid": (
        ModelConfig(
            vocab_size=37, num_layers=2, width=16, num_heads=2, num_kv_heads=2, head_dim=8, tie_embeddings=True
        ),
        layer_config(num_experts=5, top_k=3, expert_width=8, activation="gelu", score="sigmoid", loss_free=True),
    ),
    "relu2, k = e": (
        ModelConfig(vocab_size=37, num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, dense_first=1),
        layer_config(num_experts=4, top_k=4, expert_width=8, activation="relu2", balance_scope="micro"),
    ),
}
ROWS = [[9, 3], [12], [4, 4, 2]]


def _params(model: ModelConfig, config: MoELayerConfig, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return random_parameters(model, config.moe, seed=3, dtype=dtype)


def _run(
    model: ModelConfig,
    config: MoELayerConfig,
    batch: PackedBatch,
    *,
    dtype: torch.dtype = torch.float64,
    recompute: bool = False,
) -> Result:
    network, store, _ = one_process_model(model, config, dtype, activation_checkpoint=recompute)
    load(network, store, _params(model, config, dtype))
    output = network(batch, num_step_tokens=40)
    (output.ce_sum / 20 + output.aux).backward()
    store.reduce_gradients()
    return output.ce_sum.detach(), output.aux.detach(), whole_values(network, store, gradients=True)


def _oracle(model: ModelConfig, config: MoELayerConfig, batch: PackedBatch) -> Result:
    params = {name: value.requires_grad_() for name, value in _params(model, config).items()}
    zeros = {layer: torch.zeros(config.moe.num_experts, dtype=torch.int64) for layer in model.moe_layers}
    balance = BalanceInputs(zeros, {layer: zero.double() for layer, zero in zeros.items()})
    terms = loss_terms(params, model, config, documents_of(batch), balance, 40)
    grads = torch.autograd.grad(terms.ce_sum / 20 + terms.aux, list(params.values()), materialize_grads=True)
    return terms.ce_sum.detach(), terms.aux.detach(), dict(zip(params, grads, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_every_gradient_are_the_oracles(name: str) -> None:
    model, config = VARIANTS[name]
    ce_sum, aux, grads = _run(model, config, make_batch(ROWS))
    want_ce, want_aux, want_grads = _oracle(model, config, make_batch(ROWS))
    torch.testing.assert_close(ce_sum, want_ce, rtol=1e-11, atol=0)
    torch.testing.assert_close(aux, want_aux, rtol=1e-11, atol=0)
    assert largest_error(grads, want_grads) < 1e-11


@pytest.fixture(scope="module")
def oracle_grads() -> dict[str, Tensor]:
    return _oracle(MODEL, MOE, make_batch(ROWS))[2]


@pytest.mark.parametrize(
    "change", [{"rope_theta": 100.0}, {"norm_eps": 1e-3}, {"num_kv_heads": 4, "num_heads": 4}, {"qk_norm": False}]
)
def test_another_model_is_told_apart(change: dict[str, Any], oracle_grads: dict[str, Tensor]) -> None:
    want = oracle_grads
    _, _, grads = _run(replace(MODEL, **change), MOE, make_batch(ROWS))
    same = {name: grads[name] for name in want if name in grads and grads[name].shape == want[name].shape}
    assert largest_error(same, {name: want[name] for name in same}) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_recomputation_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    model, config = VARIANTS[name]
    kept = _run(model, config, make_batch(ROWS), dtype=dtype)
    recomputed = _run(model, config, make_batch(ROWS), dtype=dtype, recompute=True)
    assert torch.equal(kept[0], recomputed[0])
    assert torch.equal(kept[1], recomputed[1])
    assert all(torch.equal(grad, recomputed[2][key]) for key, grad in kept[2].items())


@pytest.mark.parametrize("recompute", [False, True])
def test_choices_are_counted_once_and_only_in_training(recompute: bool) -> None:
    network, store, balance = one_process_model(MODEL, MOE, torch.float64, activation_checkpoint=recompute)
    load(network, store, _params(MODEL, MOE))
    batch = make_batch(ROWS)
    output = network(batch, num_step_tokens=40)
    (output.ce_sum + output.aux).backward()
    network.eval()
    with torch.no_grad():
        network(batch, num_step_tokens=40)
        network.train()
        network(batch, num_step_tokens=40)
    report = balance.finish_step(Tensor.clone)
    assert report.count_LE.sum(dim=1).tolist() == [batch.num_tokens * MOE.moe.top_k] * 2


def test_a_document_never_sees_another() -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float64)
    load(network, store, _params(MODEL, MOE))
    batch = make_batch([[5, 7]])
    is_first = torch.arange(12) < 5
    changed = replace(batch, token_id_T=(batch.token_id_T + is_first) % 37)
    joined = replace(batch, pieces=(Piece(100, 0, 12, 0),))
    with torch.no_grad():
        before, after, together = (network.logits(one) for one in (batch, changed, joined))
    assert torch.equal(before[5:], after[5:])
    assert (before[:5] - after[:5]).abs().max() > 1e-3
    assert (before[5:] - together[5:]).abs().max() > 1e-3
    torch.testing.assert_close(before[:5], together[:5], rtol=1e-11, atol=1e-12)


def test_a_document_is_the_same_wherever_it_is_packed() -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float64)
    load(network, store, _params(MODEL, MOE))
    packed = make_batch([[5, 7]])
    alone = PackedBatch(packed.token_id_T[5:], packed.target_T[5:], (Piece(7, 3, 10, 3),))
    halves = replace(alone, pieces=(Piece(7, 3, 6, 3), Piece(7, 6, 10, 6)))
    with torch.no_grad():
        inside, outside, cut = network.logits(packed)[5:], network.logits(alone), network.logits(halves)
    torch.testing.assert_close(inside, outside, rtol=1e-11, atol=1e-12)
    assert (cut - outside).abs().max() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_tokens_give_zero_losses_and_zero_gradients(name: str, recompute: bool) -> None:
    model, config = VARIANTS[name]
    ce_sum, aux, grads = _run(model, config, PackedBatch.empty(), recompute=recompute)
    assert float(ce_sum) == 0.0
    assert float(aux) == 0.0
    assert all(not grad.any() for grad in grads.values())


def test_a_single_token_equals_the_oracle() -> None:
    batch = PackedBatch(torch.tensor([3]), torch.tensor([5]), (Piece(0, 0, 1, 0),))
    ce_sum, aux, grads = _run(MODEL, MOE, batch)
    want_ce, want_aux, want_grads = _oracle(MODEL, MOE, batch)
    torch.testing.assert_close(ce_sum, want_ce, rtol=1e-11, atol=0)
    torch.testing.assert_close(aux, want_aux, rtol=1e-11, atol=0)
    assert largest_error(grads, want_grads) < 1e-11


def test_logits_give_the_loss() -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float64)
    load(network, store, _params(MODEL, MOE))
    batch = make_batch(ROWS)
    with torch.no_grad():
        logits_TV = network.logits(batch)
        ce_sum = network(batch, num_step_tokens=40).ce_sum
    want = torch.nn.functional.cross_entropy(logits_TV, batch.target_T, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(ce_sum, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("quickstart", 0.00723), ("mixtral-8x7b", 46.7), ("qwen1.5-moe-a2.7b", 14.3), ("qwen3-235b-a22b", 235.1)],
)
def test_presets_build_without_memory(name: str, billions: float) -> None:
    run = preset(name)
    nobody = LayerServices(*[cast(Any, None)] * 3)
    with torch.device("meta"):
        network = Transformer(
            run.model, run.moe, lambda layer: MoELayer(run.model.width, run.layer_config, layer, nobody)
        )
    expert = ExpertShape(width=run.model.width, hidden=run.moe.expert_width, gated=run.moe.gated)
    experts = len(run.model.moe_layers) * run.moe.num_experts * expert.num_parameters
    dense = sum(parameter.numel() for parameter in network.parameters())
    assert (dense + experts) / 1e9 == pytest.approx(billions, rel=0.005)


def test_parameter_names_are_the_logical_ones() -> None:
    for model, config in VARIANTS.values():
        network, store, _ = one_process_model(model, config, torch.float64)
        found = whole_values(network, store)
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in _params(model, config).items()
        }
