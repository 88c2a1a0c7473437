"""What an MoE layer is: its experts, its router, how load is balanced, how tokens reach experts."""

from dataclasses import dataclass, field
from typing import Literal

from moetrain.config.errors import NotBuiltYetError, require
from moetrain.config.fields import check_fields, setting

Activation = Literal["swiglu", "gelu", "relu2"]
Score = Literal["softmax", "topk_softmax", "sigmoid"]
GroupRule = Literal["top2_sum", "max"]
BalanceScope = Literal["lagged", "micro", "buffer", "none"]
CapacityOrder = Literal["weight", "position"]
RoundRule = Literal["nearest", "stochastic", "nearest_score", "balance", "up", "down"]
RoundingRule = Literal["none", RoundRule]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Experts of an MoE layer, and how many a token is sent to."""

    num_experts: int = setting(16, "Experts of each MoE layer (E).", unit="experts", least=1)
    top_k: int = setting(4, "Experts that each token is sent to (K), at most num_experts.", unit="experts", least=1)
    expert_width: int = setting(128, "Hidden width of an expert (F), a multiple of mesh.etp.", unit="elements", least=1)
    activation: Activation = setting(
        "swiglu", "Nonlinearity of experts and dense MLPs: SiLU with a gate, GELU, or the square of ReLU."
    )
    num_shared_experts: int = setting(
        0,
        "Experts that every token passes, as one MLP of width num_shared_experts * expert_width.",
        unit="experts",
        least=0,
    )
    shared_width: int | None = setting(
        None,
        "Hidden width of that shared MLP itself, where it is no multiple of expert_width; none leaves it to "
        "num_shared_experts.",
        unit="elements",
        least=1,
    )
    shared_gate: bool = setting(False, "Scale the shared MLP's output by a sigmoid of the token (Qwen2-MoE).")
    num_null_experts: int = setting(
        0,
        "Experts that compute nothing, for tokens to choose instead of others (not built yet).",
        unit="experts",
        least=0,
    )
    expert_biases: bool = setting(False, "Give experts biases (not built yet).")
    recompute_hidden: bool = setting(
        False, "Compute experts' hidden rows again in the backward pass: less memory, one more matrix product."
    )

    def __post_init__(self) -> None:
        check_fields(self, "moe")
        require(
            self.top_k <= self.num_experts,
            f"moe.top_k ({self.top_k}) must be at most moe.num_experts ({self.num_experts}); lower moe.top_k",
        )
        require(
            self.shared_width is None or self.num_shared_experts == 0,
            f"moe.shared_width ({self.shared_width}) and moe.num_shared_experts ({self.num_shared_experts}) "
            "both give the shared MLP's width; set only one",
        )
        require(
            not self.shared_gate or self.shared_hidden > 0,
            "moe.shared_gate is true but there is no shared expert; set moe.shared_width or moe.num_shared_experts",
        )
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Choice and weights of a token's experts."""

    score: Score = setting(
        "softmax", "Scores of experts: softmax over all of them, softmax over those chosen, or a sigmoid of each."
    )
    renormalise: bool = setting(True, "Make the weights of a token's chosen experts sum to 1, before weight_scale.")
    weight_scale: float = setting(1.0, "Factor on the weights of chosen experts.", above=0, cure="1.0 is neutral")
    num_groups: int = setting(
        1,
        "Groups of experts for group-limited routing (DeepSeek), a divisor of moe.num_experts; 1 is routing without.",
        unit="groups",
        least=1,
    )
    groups_kept: int = setting(
        1, "Groups that a token may choose experts from, at most num_groups.", unit="groups", least=1
    )
    group_rule: GroupRule = setting(
        "top2_sum", "What a group is worth to a token: the sum of its two best scores, or its best score."
    )

    def __post_init__(self) -> None:
        check_fields(self, "router")
        require(
            self.groups_kept <= self.num_groups,
            f"router.groups_kept ({self.groups_kept}) must be at most router.num_groups ({self.num_groups}); lower it",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceConfig:
    """Losses and biases that keep experts evenly loaded, and logits small."""

    scope: BalanceScope = setting(
        "lagged",
        "Load that the balance loss sees: of the whole step before (lagged), of the micro-batch (micro), of several "
        "(buffer, not built yet); none turns the loss off.",
    )
    coef: float = setting(
        1e-2, "Factor on the balance loss, which is 1 for even load, per token and MoE layer.", least=0.0
    )
    z_loss_coef: float = setting(
        1e-3, "Factor on the square of log(sum(exp(logits))), per token and MoE layer.", least=0.0
    )
    loss_free: bool = setting(
        False, "Add to each expert's score, in selection only, a bias that steps against its load (arXiv 2408.15664)."
    )
    bias_rate: float = setting(1e-3, "How far such a bias moves each step, in units of scores.", least=0.0, most=1.0)

    def __post_init__(self) -> None:
        check_fields(self, "balance")
        if self.scope == "buffer":
            raise NotBuiltYetError("balance.scope", "buffer", "use 'lagged' (invariant) or 'micro'")


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    """How tokens are sent to their experts, and how many rows an expert takes."""

    capacity_factor: float | None = setting(
        None,
        "Rows that an expert takes of a rank's micro-batch in training, as a multiple of the even share K * T / E; "
        "the rest is dropped, nothing for none.",
        above=0,
        cure="1.25 is usual, and leaving it out drops nothing",
    )
    capacity_by: CapacityOrder = setting(
        "weight", "Which rows stay where a capacity drops some: those of the largest weight, or the first."
    )
    pad_to_capacity: bool = setting(
        False,
        "In training, send messages of the fixed size that capacity_factor bounds: nothing is counted, the host never "
        "waits.",
    )
    pieces: int = setting(
        1, "Pieces of a micro-batch: one is dispatched while experts work on another.", unit="pieces", least=1
    )
    rounding: RoundingRule = setting(
        "none", "Rule by which each expert's rows become a multiple of tile in training (arXiv 2512.14080), or none."
    )
    tile: int = setting(
        128, "Rows of a tile (M).", unit="rows", least=1, most=65536, cure="128 is the tile of GPU kernels"
    )

    def __post_init__(self) -> None:
        check_fields(self, "dispatch")
        require(
            not self.pad_to_capacity or self.capacity_factor is not None,
            "dispatch.pad_to_capacity needs a bound to pad to; set dispatch.capacity_factor, 1.25 is usual",
        )
        require(
            self.capacity_factor is None or self.rounding == "none",
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
