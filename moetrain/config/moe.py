"""What an MoE layer is: its experts, its router, how load is balanced, how tokens reach experts."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from moetrain.config.errors import NotBuiltYetError, require, require_at_least, require_in, require_one_of

Activation = Literal["swiglu", "gelu", "relu2"]
Score = Literal["softmax", "topk_softmax", "sigmoid"]
GroupRule = Literal["top2_sum", "max"]
BalanceScope = Literal["lagged", "micro", "buffer", "none"]
CapacityOrder = Literal["weight", "position"]
RoundingRule = Literal["none", "nearest", "stochastic", "nearest_score", "balance", "up", "down"]

MOST_TILE = 65536  # of round_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Experts: how many, how many per token, and what one computes."""

    num_experts: int = 16  # E
    top_k: int = 4  # K
    expert_width: int = 128  # F
    activation: Activation = "swiglu"
    num_shared_experts: int = 0  # one shared MLP of width num_shared_experts * expert_width
    shared_width: int | None = None  # or that width itself
    shared_gate: bool = False  # a sigmoid gate on the shared MLP (Qwen2-MoE)
    num_null_experts: int = 0
    expert_biases: bool = False
    recompute_hidden: bool = False  # in the backward pass, instead of keeping every pair's pre-activations

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "expert_width"):
            require_at_least(f"moe.{name}", getattr(self, name), 1)
        require(
            self.top_k <= self.num_experts,
            f"moe.top_k ({self.top_k}) must be at most moe.num_experts ({self.num_experts}); lower moe.top_k",
        )
        require_one_of("moe.activation", self.activation, get_args(Activation))
        self._check_shared()
        require_at_least("moe.num_null_experts", self.num_null_experts, 0)
        if self.num_null_experts:
            raise NotBuiltYetError("moe.num_null_experts", self.num_null_experts, "set it to 0")
        if self.expert_biases:
            raise NotBuiltYetError("moe.expert_biases", True, "experts here have no biases")

    def _check_shared(self) -> None:
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

    @property
    def shared_hidden(self) -> int:
        """Hidden width of the shared MLP; 0 where there is none."""
        return self.shared_width if self.shared_width is not None else self.num_shared_experts * self.expert_width

    @property
    def gated(self) -> bool:
        """Whether an expert's first matrix has gate and up rows."""
        return self.activation == "swiglu"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a token's experts are chosen and weighed."""

    score: Score = "softmax"
    renormalise: bool = True  # weights of the chosen experts sum to 1
    weight_scale: float = 1.0
    num_groups: int = 1  # group-limited routing (DeepSeek)
    groups_kept: int = 1
    group_rule: GroupRule = "top2_sum"

    def __post_init__(self) -> None:
        require_one_of("router.score", self.score, get_args(Score))
        require(self.weight_scale > 0, f"router.weight_scale must be positive, got {self.weight_scale}; 1.0 is neutral")
        for name in ("num_groups", "groups_kept"):
            require_at_least(f"router.{name}", getattr(self, name), 1)
        require(
            self.groups_kept <= self.num_groups,
            f"router.groups_kept ({self.groups_kept}) must be at most router.num_groups ({self.num_groups}); lower it",
        )
        require_one_of("router.group_rule", self.group_rule, get_args(GroupRule))


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceConfig:
    """What keeps experts evenly loaded, and logits small."""

    scope: BalanceScope = "lagged"
    coef: float = 1e-2
    z_loss_coef: float = 1e-3
    loss_free: bool = False  # selection bias moved by the sign rule (Wang et al., 2408.15664)
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        require_one_of("balance.scope", self.scope, get_args(BalanceScope))
        require_at_least("balance.coef", self.coef, 0.0)
        require_at_least("balance.z_loss_coef", self.z_loss_coef, 0.0)
        require_in("balance.bias_rate", self.bias_rate, 0.0, 1.0)
        if self.scope == "buffer":
            raise NotBuiltYetError("balance.scope", "buffer", "use 'lagged' (invariant) or 'micro'")


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    """How tokens travel to their experts, and how many rows an expert takes."""

    capacity_factor: float | None = None  # in training, drop beyond ceil(factor * K * T / E) rows of a rank; None: none
    capacity_by: CapacityOrder = "weight"  # who stays
    pad_to_capacity: bool = False  # in training, messages of fixed size: nothing is counted, the host never waits
    pieces: int = 1  # of a micro-batch; rows of one travel while experts work on another
    rounding: RoundingRule = "none"  # in training: rows of each expert become a multiple of tile (2512.14080)
    tile: int = 128  # M, rows of a tile

    def __post_init__(self) -> None:
        require_one_of("dispatch.capacity_by", self.capacity_by, get_args(CapacityOrder))
        require_one_of("dispatch.rounding", self.rounding, get_args(RoundingRule))
        require_in("dispatch.tile", self.tile, 1, MOST_TILE, "128 is the tile of GPU kernels")
        require_at_least("dispatch.pieces", self.pieces, 1)
        require(
            not self.pad_to_capacity or self.capacity_factor is not None,
            "dispatch.pad_to_capacity needs a bound to pad to; set dispatch.capacity_factor, 1.25 is usual",
        )
        if self.capacity_factor is not None:
            require(
                self.capacity_factor > 0,
                f"dispatch.capacity_factor must be positive, got {self.capacity_factor}; 1.25 is usual, and leaving it "
                "out drops nothing",
            )
            require(
                self.rounding == "none",
                f"dispatch.capacity_factor and dispatch.rounding ({self.rounding!r}) both choose rows of an expert; "
                "set only one",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayerConfig:
    """The four tables that make an MoE layer, and the checks that need more than one of them."""

    moe: MoEConfig = field(default_factory=MoEConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)

    def __post_init__(self) -> None:
        num_experts, num_groups = self.moe.num_experts, self.router.num_groups
        require(
            num_experts % num_groups == 0,
            f"router.num_groups ({num_groups}) must divide moe.num_experts ({num_experts}); "
            "use 1 for routing without groups",
        )
        kept = self.router.groups_kept
        reachable = kept * (num_experts // num_groups)
        require(
            self.moe.top_k <= reachable,
            f"moe.top_k ({self.moe.top_k}) must be at most the {reachable} experts of the {kept} groups kept; "
            "raise router.groups_kept",
        )
