"""What the transformer is, around its MoE layers."""

from dataclasses import dataclass
from typing import Literal, get_args

from moetrain.config.errors import NotBuiltYetError, require, require_at_least, require_in, require_one_of

Attention = Literal["gqa", "mla"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Widths are in elements, ``dense_first`` in layers."""

    vocab_size: int = 259
    num_layers: int = 4
    width: int = 256  # D
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    attention: Attention = "gqa"
    rope_theta: float = 10000.0
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = False
    dense_first: int = 0  # the first layers that have a dense MLP in place of experts
    dense_width: int = 1024  # hidden width of those MLPs
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for field in ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "dense_width"):
            require_at_least(f"model.{field}", getattr(self, field), 1)
        require_one_of("model.attention", self.attention, get_args(Attention))
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
        require(self.rope_theta > 0, f"model.rope_theta must be positive, got {self.rope_theta}; 10000.0 is usual")
        require(self.norm_eps > 0, f"model.norm_eps must be positive, got {self.norm_eps}; 1e-6 is usual")
        require(self.init_std > 0, f"model.init_std must be positive, got {self.init_std}; 0.02 is usual")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(range(self.dense_first, self.num_layers))
