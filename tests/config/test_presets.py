"""Presets have the sizes their models are known by; what moetrain cannot build is refused by the feature's name."""

from dataclasses import replace

import pytest

from moetrain.config import PRESETS, NotBuiltYetError, RunConfig, preset

REFUSED = {
    "olmoe-1b-7b": "model.qk_norm_over",
    "glm-4.5-air": "model.partial_rotary_factor",
    "deepseek-v2-lite": "model.attention",
    "deepseek-v3": "model.attention",
    "kimi-k2": "model.attention",
    "gpt-oss-20b": "moe.expert_biases",
    "gpt-oss-120b": "moe.expert_biases",
    "llama-4-scout": "router.weight_scales",
}

# Billions of parameters, as published; the small ones are in millions below.
BILLIONS = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "quickstart": 0.0073,
    "tiny": 0.000157,
}


def count_parameters(run: RunConfig) -> int:
    model, moe = run.model, run.moe
    matrices = 3 if moe.gated else 2
    q_width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = 2 * model.width * (q_width + kv_width)
    attention += (q_width + 2 * kv_width) * model.qkv_bias + 2 * model.head_dim * model.qk_norm
    experts = moe.num_experts * matrices * model.width * moe.expert_width + moe.num_experts * model.width
    experts += matrices * model.width * moe.shared_hidden + model.width * moe.shared_gate
    dense = matrices * model.width * model.dense_width
    blocks = model.num_layers * (attention + 2 * model.width)
    blocks += len(model.moe_layers) * experts + model.dense_first * dense
    return blocks + model.vocab_size * model.width * (1 if model.tie_embeddings else 2) + model.width


def test_every_preset_is_built_or_refused() -> None:
    assert set(PRESETS) == set(BILLIONS) | set(REFUSED)


@pytest.mark.parametrize("name", BILLIONS)
def test_sizes_are_those_published(name: str) -> None:
    assert count_parameters(preset(name)) / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_named(name: str) -> None:
    with pytest.raises(NotBuiltYetError, match=rf"^{REFUSED[name]} = .* is not built yet in moetrain; "):
        preset(name)


def test_quickstart_is_the_defaults_started_wider_in_the_machines_own_precision() -> None:
    defaults = RunConfig()
    wider = replace(defaults.model, init_std=defaults.model.width**-0.5)
    native = replace(defaults.train, dtype="auto", reshard_after_forward=False)
    fewer_rounds = replace(defaults.data, micro_batch=8)
    assert preset("quickstart") == replace(defaults, model=wider, data=fewer_rounds, train=native)


def test_unknown_presets_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'qwen3-30b-a3b'"):
        preset("qwen3-30b")
