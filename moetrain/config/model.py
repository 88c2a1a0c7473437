"""What the transformer is, around its MoE layers."""

from dataclasses import dataclass
from typing import Literal

from moetrain.config.errors import NotBuiltYetError, require, require_in
from moetrain.config.fields import check_fields, setting

Attention = Literal["gqa", "mla"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The transformer, decoder only, around its MoE layers."""

    vocab_size: int = setting(
        259, "Token ids that the embedding and the head know, at least those of the dataset.", unit="ids", least=1
    )
    num_layers: int = setting(4, "Layers, those with a dense MLP included.", unit="layers", least=1)
    width: int = setting(256, "Width of a token between layers (D).", unit="elements", least=1)
    num_heads: int = setting(8, "Query heads, a multiple of mesh.tp.", unit="heads", least=1)
    num_kv_heads: int = setting(
        4, "Key and value heads, a divisor of num_heads: each serves as many query heads.", unit="heads", least=1
    )
    head_dim: int = setting(
        32, "Width of a head, an even number since rotary embeddings turn pairs.", unit="elements", least=1
    )
    attention: Attention = setting("gqa", "Grouped-query attention, or multi-head latent attention (not built yet).")
    rope_theta: float = setting(10000.0, "Base of the rotary embeddings.", above=0, cure="10000.0 is usual")
    qk_norm: bool = setting(False, "Normalise each head's queries and keys before attention (Qwen3).")
    qkv_bias: bool = setting(False, "Add a bias to queries, keys and values (Qwen2).")
    tie_embeddings: bool = setting(False, "Use the embedding's weight as the head's.")
    dense_first: int = setting(
        0, "First layers that have a dense MLP in place of experts, at most num_layers.", unit="layers", least=0
    )
    dense_width: int = setting(1024, "Hidden width of those dense MLPs.", unit="elements", least=1)
    norm_eps: float = setting(
        1e-6, "Added to the mean square that RMSNorm divides by the root of.", above=0, cure="1e-6 is usual"
    )
    init_std: float = setting(
        0.02,
        "Standard deviation of initial weights; 1 / sqrt(2 * num_layers) of it where a layer writes its output.",
        above=0,
        cure="0.02 is usual",
    )

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.attention == "mla":
            raise NotBuiltYetError("model.attention", "mla", "use grouped-query attention ('gqa')")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads ({self.num_kv_heads}); "
            f"set model.num_kv_heads to a divisor of {self.num_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.head_dim must be even, since rotary embeddings turn pairs, got {self.head_dim}; "
            f"use {self.head_dim + 1}",
        )
        require_in("model.dense_first", self.dense_first, 0, self.num_layers, "there are model.num_layers layers")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(range(self.dense_first, self.num_layers))
