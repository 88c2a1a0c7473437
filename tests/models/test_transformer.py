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
from moetrain.sequence.batch import PackedBatch

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
    ce_sum, aux, grads = _run(model, config, make_batch(ROWS, 12))
    want_ce, want_aux, want_grads = _oracle(model, config, make_batch(ROWS, 12))
    torch.testing.assert_close(ce_sum, want_ce, rtol=1e-11, atol=0)
    torch.testing.assert_close(aux, want_aux, rtol=1e-11, atol=0)
    assert largest_error(grads, want_grads) < 1e-11


@pytest.fixture(scope="module")
def oracle_grads() -> dict[str, Tensor]:
    return _oracle(MODEL, MOE, make_batch(ROWS, 12))[2]


@pytest.mark.parametrize(
    "change", [{"rope_theta": 100.0}, {"norm_eps": 1e-3}, {"num_kv_heads": 4, "num_heads": 4}, {"qk_norm": False}]
)
def test_another_model_is_told_apart(change: dict[str, Any], oracle_grads: dict[str, Tensor]) -> None:
    want = oracle_grads
    _, _, grads = _run(replace(MODEL, **change), MOE, make_batch(ROWS, 12))
    same = {name: grads[name] for name in want if name in grads and grads[name].shape == want[name].shape}
    assert largest_error(same, {name: want[name] for name in same}) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_recomputation_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    model, config = VARIANTS[name]
    kept = _run(model, config, make_batch(ROWS, 12), dtype=dtype)
    recomputed = _run(model, config, make_batch(ROWS, 12), dtype=dtype, recompute=True)
    assert torch.equal(kept[0], recomputed[0])
    assert torch.equal(kept[1], recomputed[1])
    assert all(torch.equal(grad, recomputed[2][key]) for key, grad in kept[2].items())


@pytest.mark.parametrize("recompute", [False, True])
def test_choices_are_counted_once_and_only_in_training(recompute: bool) -> None:
    network, store, balance = one_process_model(MODEL, MOE, torch.float64, activation_checkpoint=recompute)
    load(network, store, _params(MODEL, MOE))
    batch = make_batch(ROWS, 12)
    output = network(batch, num_step_tokens=40)
    (output.ce_sum + output.aux).backward()
    network.eval()
    with torch.no_grad():
        network(batch, num_step_tokens=40)
        network.train()
        network(batch, num_step_tokens=40)
    report = balance.finish_step(Tensor.clone)
    assert report.count_LE.sum(dim=1).tolist() == [batch.num_tokens * MOE.moe.top_k] * 2


def _first_and_last(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch]:
    """Loss on the first document alone, and on the others alone."""
    first = batch.document_BS == 0
    return (
        replace(batch, target_BS=batch.target_BS.where(first, -1)),
        replace(batch, target_BS=batch.target_BS.where(~first, -1)),
    )


def test_a_document_never_sees_another() -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float64)
    load(network, store, _params(MODEL, MOE))
    batch = make_batch([[5, 7]], 12)
    changed = replace(batch, token_id_BS=(batch.token_id_BS + (batch.document_BS == 0)) % 37)
    joined = replace(batch, document_BS=torch.zeros_like(batch.document_BS))
    with torch.no_grad():
        ce = [
            [float(network(part, num_step_tokens=40).ce_sum) for part in _first_and_last(one)]
            for one in (batch, changed)
        ]
        joined_ce = float(
            network(replace(_first_and_last(batch)[1], document_BS=joined.document_BS), num_step_tokens=1)[0]
        )
    assert ce[0][1] == ce[1][1]
    assert abs(ce[0][0] - ce[1][0]) > 1e-3
    assert abs(joined_ce - ce[0][1]) > 1e-3


def test_a_document_is_the_same_wherever_it_is_packed() -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float64)
    load(network, store, _params(MODEL, MOE))
    packed = make_batch([[5, 7]], 12)
    token_id_BS, target_BS, position_BS = (x[:, 5:] for x in (packed.token_id_BS, packed.target_BS, packed.position_BS))
    document_BS = torch.zeros(1, 7, dtype=torch.int64)
    alone = PackedBatch(token_id_BS, target_BS, position_BS, document_BS, packed.sequence_id_B)
    with torch.no_grad():
        inside, outside = network.logits(packed)[:, 5:], network.logits(alone)
        shifted = network.logits(replace(alone, position_BS=alone.position_BS * 2))
    torch.testing.assert_close(inside, outside, rtol=1e-11, atol=1e-12)
    assert (shifted - outside).abs().max() > 1e-3


def test_padding_changes_nothing() -> None:
    whole = _run(MODEL, MOE, make_batch([[6]], 6))
    batch = make_batch([[6]], 9)
    short = make_batch([[6]], 6)
    for name in ("token_id_BS", "target_BS"):
        getattr(batch, name)[:, :6] = getattr(short, name)
    padded = _run(MODEL, MOE, batch)
    torch.testing.assert_close(padded[0], whole[0], rtol=1e-11, atol=0)
    torch.testing.assert_close(padded[1], whole[1], rtol=1e-11, atol=0)
    assert largest_error(padded[2], whole[2]) < 1e-11


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_rows_give_zero_losses_and_zero_gradients(name: str, recompute: bool) -> None:
    model, config = VARIANTS[name]
    ce_sum, aux, grads = _run(model, config, PackedBatch.empty(12), recompute=recompute)
    assert float(ce_sum) == 0.0
    assert float(aux) == 0.0
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("rows", [[[1]], [[], [1]]])
def test_a_single_token_equals_the_oracle(rows: list[list[int]]) -> None:
    batch = make_batch(rows, 3)
    batch.target_BS[-1, 0] = 5
    batch = replace(batch, num_loss_tokens=1)
    ce_sum, aux, grads = _run(MODEL, MOE, batch)
    want_ce, want_aux, want_grads = _oracle(MODEL, MOE, batch)
    torch.testing.assert_close(ce_sum, want_ce, rtol=1e-11, atol=0)
    torch.testing.assert_close(aux, want_aux, rtol=1e-11, atol=0)
    assert largest_error(grads, want_grads) < 1e-11


def test_logits_give_the_loss() -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float64)
    load(network, store, _params(MODEL, MOE))
    batch = make_batch(ROWS, 12)
    with torch.no_grad():
        logits_BSV = network.logits(batch)
        ce_sum = network(batch, num_step_tokens=40).ce_sum
    want = torch.nn.functional.cross_entropy(
        logits_BSV.flatten(0, 1), batch.target_BS.flatten(), ignore_index=-1, reduction="sum"
    )
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
