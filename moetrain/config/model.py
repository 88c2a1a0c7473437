"""What the network is: the transformer and its MoE layers."""

from dataclasses import dataclass
from typing import Literal, get_args

from moetrain.config.errors import (
    NotBuiltYetError,
    require,
    require_at_least,
    require_in,
    require_one_of,
)

Activation = Literal["swiglu", "gelu", "relu2"]
Score = Literal["softmax", "topk_softmax", "sigmoid"]
BalanceScope = Literal["lagged", "micro", "buffer", "none"]
RoundingRule = Literal["none", "nearest", "stochastic", "nearest_score", "balance", "up", "down"]

MOST_TILE = 65536  # of round_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Widths are in elements, ``dense_first`` in layers."""

    vocab_size: int = 259
    num_layers: int = 4
    width: int = 256  # D
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    attention: Literal["gqa", "mla"] = "gqa"
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
        require_one_of("model.attention", self.attention, ("gqa", "mla"))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Experts, their router and how load is balanced."""

    num_experts: int = 16  # E
    top_k: int = 4  # K
    expert_width: int = 128  # F
    activation: Activation = "swiglu"
    num_shared_experts: int = 0  # one shared MLP of width num_shared_experts * expert_width
    shared_width: int | None = None  # or that width itself
    shared_gate: bool = False  # a sigmoid gate on the shared MLP (Qwen2-MoE)
    score: Score = "softmax"
    renormalise: bool = True  # weights of the chosen experts sum to 1
    weight_scale: float = 1.0
    num_groups: int = 1  # group-limited routing (DeepSeek)
    groups_kept: int = 1
    group_rule: Literal["top2_sum", "max"] = "top2_sum"
    loss_free: bool = False  # selection bias moved by the sign rule (Wang et al., 2408.15664)
    bias_rate: float = 1e-3
    balance_scope: BalanceScope = "lagged"
    balance_coef: float = 1e-2
    z_loss_coef: float = 1e-3
    num_null_experts: int = 0
    capacity_factor: float | None = None  # in training, drop beyond ceil(factor * K * T / E) rows of a rank; None: none
    capacity_by: Literal["weight", "position"] = "weight"  # who stays
    pad_to_capacity: bool = False  # in training, messages of fixed size: nothing is counted, the host never waits
    dispatch_pieces: int = 1  # of a micro-batch; rows of one travel while experts work on another
    rounding: RoundingRule = "none"  # in training: rows of each expert become a multiple of tile (2512.14080)
    tile: int = 128  # M, rows of a tile
    expert_biases: bool = False
    recompute_hidden: bool = False  # in the backward pass, instead of keeping every pair's pre-activations

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "expert_width", "num_groups", "groups_kept"):
            require_at_least(f"moe.{field}", getattr(self, field), 1)
        require(
            self.top_k <= self.num_experts,
            f"moe.top_k ({self.top_k}) must be at most moe.num_experts ({self.num_experts}); lower moe.top_k",
        )
        require_one_of("moe.activation", self.activation, ("swiglu", "gelu", "relu2"))
        require_one_of("moe.score", self.score, ("softmax", "topk_softmax", "sigmoid"))
        require_one_of("moe.balance_scope", self.balance_scope, ("lagged", "micro", "buffer", "none"))
        require_one_of("moe.group_rule", self.group_rule, ("top2_sum", "max"))
        require_one_of("moe.rounding", self.rounding, get_args(RoundingRule))
        self._check_groups()
        self._check_ranges()
        self._refuse_unbuilt()

    def _check_groups(self) -> None:
        require(
            self.num_experts % self.num_groups == 0,
            f"moe.num_groups ({self.num_groups}) must divide moe.num_experts ({self.num_experts}); "
            "use 1 for routing without groups",
        )
        require(
            self.groups_kept <= self.num_groups,
            f"moe.groups_kept ({self.groups_kept}) must be at most moe.num_groups ({self.num_groups}); lower it",
        )
        reachable = self.groups_kept * (self.num_experts // self.num_groups)
        require(
            self.top_k <= reachable,
            f"moe.top_k ({self.top_k}) must be at most the {reachable} experts of the {self.groups_kept} groups kept; "
            "raise moe.groups_kept",
        )

    def _check_ranges(self) -> None:
        require_at_least("moe.num_shared_experts", self.num_shared_experts, 0)
        if self.shared_width is not None:
            require_at_least("moe.shared_width", self.shared_width, 1)
            require(
                self.num_shared_experts == 0,
                f"moe.shared_width ({self.shared_width}) and moe.num_shared_experts ({self.num_shared_experts}) "
                "both give the shared MLP's width; set only one",
            )
        require(
            not self.shared_gate or self.shared_hidden > 0,
            "moe.shared_gate is true but there is no shared expert; set moe.shared_width or moe.num_shared_experts",
        )
        require_at_least("moe.num_null_experts", self.num_null_experts, 0)
        require_in("moe.tile", self.tile, 1, MOST_TILE, "128 is the tile of GPU kernels")
        require_one_of("moe.capacity_by", self.capacity_by, ("weight", "position"))
        require_at_least("moe.dispatch_pieces", self.dispatch_pieces, 1)
        require(
            not self.pad_to_capacity or self.capacity_factor is not None,
            "moe.pad_to_capacity needs a bound to pad to; set moe.capacity_factor, 1.25 is usual",
        )
        if self.capacity_factor is not None:
            require(
                self.capacity_factor > 0,
                f"moe.capacity_factor must be positive, got {self.capacity_factor}; 1.25 is usual, and leaving it out "
                "drops nothing",
            )
            require(
                self.rounding == "none",
                f"moe.capacity_factor and moe.rounding ({self.rounding!r}) both choose rows of an expert; set only one",
            )
        require_at_least("moe.balance_coef", self.balance_coef, 0.0)
        require_at_least("moe.z_loss_coef", self.z_loss_coef, 0.0)
        require_in("moe.bias_rate", self.bias_rate, 0.0, 1.0)
        require(self.weight_scale > 0, f"moe.weight_scale must be positive, got {self.weight_scale}; 1.0 is neutral")

    def _refuse_unbuilt(self) -> None:
        if self.balance_scope == "buffer":
            raise NotBuiltYetError("moe.balance_scope", "buffer", "use 'lagged' (invariant) or 'micro'")
        if self.num_null_experts:
            raise NotBuiltYetError("moe.num_null_experts", self.num_null_experts, "set it to 0")
        if self.expert_biases:
            raise NotBuiltYetError("moe.expert_biases", True, "experts here have no biases")

    @property
    def shared_hidden(self) -> int:
        """Hidden width of the shared MLP; 0 where there is none."""
        return self.shared_width if self.shared_width is not None else self.num_shared_experts * self.expert_width

    @property
    def gated(self) -> bool:
        """Whether an expert's first matrix has gate and up rows."""
        return self.activation == "swiglu"
