"""Named run configurations: two small ones to start with, and the shapes of open MoE models.

Shapes of the open models were read in the default configurations and the model code of Hugging Face ``transformers``
(``configuration_*.py``); those of Qwen2-57B-A14B are from its published description. A model that needs a feature
moetrain does not have is refused by the name of that feature, never built without it.
"""

from collections.abc import Callable
from types import MappingProxyType

from moetrain.config.errors import NotBuiltYetError, require_one_of
from moetrain.config.model import ModelConfig
from moetrain.config.moe import BalanceConfig, MoEConfig, RouterConfig
from moetrain.config.run import RunConfig
from moetrain.config.train import DataConfig, OptimConfig, TrainConfig


def preset(name: str) -> RunConfig:
    """The run configuration called ``name``.

    Raises:
        ValueError: no preset has that name.
        NotBuiltYetError: the model needs a feature that moetrain does not have yet; the error names it.
    """
    require_one_of("preset", name, PRESETS)
    return PRESETS[name]()


def quickstart() -> RunConfig:
    """7.3 M parameters over bytes: learns real text in minutes on two CPU cores."""
    return RunConfig(
        # 1 / sqrt(width): at the usual 0.02 a few hundred steps barely leave the bigram level at this width.
        model=ModelConfig(
            vocab_size=259, num_layers=4, width=256, num_heads=8, num_kv_heads=4, head_dim=32, init_std=0.0625
        ),
        moe=MoEConfig(num_experts=16, top_k=4, expert_width=128),
        data=DataConfig(seq_len=512, global_batch=16, micro_batch=8),
        train=TrainConfig(dtype="auto", reshard_after_forward=False),
    )


def tiny() -> RunConfig:
    """A model of 0.16 M parameters whose steps take milliseconds: for tests and for trying things out."""
    return RunConfig(
        model=ModelConfig(
            vocab_size=259, num_layers=2, width=64, num_heads=4, num_kv_heads=2, head_dim=16, init_std=0.125
        ),
        moe=MoEConfig(num_experts=8, top_k=2, expert_width=32),
        data=DataConfig(seq_len=64, global_batch=8, micro_batch=2),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=20, eval_every=10, eval_rows=8),
    )


def mixtral_8x7b() -> RunConfig:
    """Mixtral 8x7B: 46.7 B parameters."""
    model = ModelConfig(
        vocab_size=32000, num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128, rope_theta=1e6,
        norm_eps=1e-5,
    )  # fmt: skip
    return _large(model, MoEConfig(num_experts=8, top_k=2, expert_width=14336))


def mixtral_8x22b() -> RunConfig:
    """Mixtral 8x22B: 140.6 B parameters."""
    model = ModelConfig(
        vocab_size=32768, num_layers=56, width=6144, num_heads=48, num_kv_heads=8, head_dim=128, rope_theta=1e6,
        norm_eps=1e-5,
    )  # fmt: skip
    return _large(model, MoEConfig(num_experts=8, top_k=2, expert_width=16384))


def qwen2_57b_a14b() -> RunConfig:
    """Qwen2-57B-A14B: a gated shared expert beside 64 routed ones, whose weights are not renormalised."""
    model = ModelConfig(
        vocab_size=151936, num_layers=28, width=3584, num_heads=28, num_kv_heads=4, head_dim=128, rope_theta=1e6,
        qkv_bias=True,
    )  # fmt: skip
    moe = MoEConfig(num_experts=64, top_k=8, expert_width=2560, shared_width=20480, shared_gate=True)
    return _large(model, moe, RouterConfig(renormalise=False))


def qwen15_moe_a27b() -> RunConfig:
    """Qwen1.5-MoE-A2.7B: 14.3 B parameters, 60 experts."""
    model = ModelConfig(
        vocab_size=151936, num_layers=24, width=2048, num_heads=16, num_kv_heads=16, head_dim=128, rope_theta=1e6,
        qkv_bias=True,
    )  # fmt: skip
    moe = MoEConfig(num_experts=60, top_k=4, expert_width=1408, shared_width=5632, shared_gate=True)
    return _large(model, moe, RouterConfig(renormalise=False))


def qwen3_30b_a3b() -> RunConfig:
    """Qwen3-30B-A3B: 30.5 B parameters, 128 experts, queries and keys normalised per head."""
    model = ModelConfig(
        vocab_size=151936, num_layers=48, width=2048, num_heads=32, num_kv_heads=4, head_dim=128, rope_theta=1e6,
        qk_norm=True,
    )  # fmt: skip
    return _large(model, MoEConfig(num_experts=128, top_k=8, expert_width=768))


def qwen3_235b_a22b() -> RunConfig:
    """Qwen3-235B-A22B: 235.1 B parameters."""
    model = ModelConfig(
        vocab_size=151936, num_layers=94, width=4096, num_heads=64, num_kv_heads=4, head_dim=128, rope_theta=1e6,
        qk_norm=True,
    )  # fmt: skip
    return _large(model, MoEConfig(num_experts=128, top_k=8, expert_width=1536))


def deepseek_v2_lite() -> RunConfig:
    """DeepSeek-V2-Lite; refused: multi-head latent attention."""
    model = ModelConfig(
        vocab_size=102400, num_layers=27, width=2048, num_heads=16, num_kv_heads=16, head_dim=128, attention="mla",
        dense_first=1, dense_width=10944,
    )  # fmt: skip
    moe = MoEConfig(num_experts=64, top_k=6, expert_width=1408, num_shared_experts=2)
    return _large(model, moe, RouterConfig(renormalise=False))


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3; refused: multi-head latent attention."""
    model = ModelConfig(
        vocab_size=129280, num_layers=61, width=7168, num_heads=128, num_kv_heads=128, head_dim=128, attention="mla",
        dense_first=3, dense_width=18432,
    )  # fmt: skip
    moe = MoEConfig(num_experts=256, top_k=8, expert_width=2048, num_shared_experts=1)
    router = RouterConfig(score="sigmoid", weight_scale=2.5, num_groups=8, groups_kept=4)
    return _large(model, moe, router, BalanceConfig(loss_free=True))


def kimi_k2() -> RunConfig:
    """Kimi-K2; refused: multi-head latent attention."""
    model = ModelConfig(
        vocab_size=163840, num_layers=61, width=7168, num_heads=64, num_kv_heads=64, head_dim=128, attention="mla",
        dense_first=1, dense_width=18432,
    )  # fmt: skip
    moe = MoEConfig(num_experts=384, top_k=8, expert_width=2048, num_shared_experts=1)
    return _large(model, moe, RouterConfig(score="sigmoid", weight_scale=2.827), BalanceConfig(loss_free=True))


def olmoe_1b_7b() -> RunConfig:
    """OLMoE-1B-7B; refused: it normalises queries and keys over all heads together, ``model.qk_norm`` does per head."""
    raise NotBuiltYetError(
        "model.qk_norm_over",
        "heads together",
        "model.qk_norm normalises per head (Qwen3), OLMoE over all heads at once",
    )


def glm_45_air() -> RunConfig:
    """GLM-4.5-Air; refused: it turns only half of each head's elements."""
    raise NotBuiltYetError(
        "model.partial_rotary_factor", 0.5, "rotary embeddings here turn the whole head; use a model that does so too"
    )


def gpt_oss_20b() -> RunConfig:
    """gpt-oss-20b; refused: biases in experts (and attention sinks, sliding windows, clamped SwiGLU)."""
    moe = MoEConfig(num_experts=32, expert_width=2880, expert_biases=True)
    return _large(ModelConfig(), moe, RouterConfig(score="topk_softmax"))


def gpt_oss_120b() -> RunConfig:
    """gpt-oss-120b; refused: biases in experts (and attention sinks, sliding windows, clamped SwiGLU)."""
    moe = MoEConfig(num_experts=128, expert_width=2880, expert_biases=True)
    return _large(ModelConfig(), moe, RouterConfig(score="topk_softmax"))


def llama4_scout() -> RunConfig:
    """Llama-4-Scout; refused: its router's weight scales the expert's input, not its output."""
    raise NotBuiltYetError(
        "router.weight_scales",
        "input",
        "router weights here scale the outputs of experts; use a model that does so too",
    )


def _large(
    model: ModelConfig, moe: MoEConfig, router: RouterConfig | None = None, balance: BalanceConfig | None = None
) -> RunConfig:
    """A pre-training run of a published shape: bf16 compute, fp32 masters, 4,096 tokens a row."""
    return RunConfig(
        model=model,
        moe=moe,
        router=router or RouterConfig(),
        balance=balance or BalanceConfig(),
        data=DataConfig(seq_len=4096, global_batch=1024, micro_batch=1),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000),
        train=TrainConfig(steps=100_000, dtype="bfloat16", activation_checkpoint=True, eval_every=1000),
    )


PRESETS: MappingProxyType[str, Callable[[], RunConfig]] = MappingProxyType(
    {
        "quickstart": quickstart,
        "tiny": tiny,
        "mixtral-8x7b": mixtral_8x7b,
        "mixtral-8x22b": mixtral_8x22b,
        "qwen1.5-moe-a2.7b": qwen15_moe_a27b,
        "qwen2-57b-a14b": qwen2_57b_a14b,
        "qwen3-30b-a3b": qwen3_30b_a3b,
        "qwen3-235b-a22b": qwen3_235b_a22b,
        "olmoe-1b-7b": olmoe_1b_7b,
        "glm-4.5-air": glm_45_air,
        "deepseek-v2-lite": deepseek_v2_lite,
        "deepseek-v3": deepseek_v3,
        "kimi-k2": kimi_k2,
        "gpt-oss-20b": gpt_oss_20b,
        "gpt-oss-120b": gpt_oss_120b,
        "llama-4-scout": llama4_scout,
    }
)
