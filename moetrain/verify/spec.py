"""What `moetrain verify` is asked to prove, checked before any process starts."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from moetrain.config import (
    ATTENTION_AXES,
    EXPERT_AXES,
    BalanceConfig,
    DataConfig,
    DispatchConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
    TrainConfig,
    mesh_from_axes,
    parse_axes,
)
from moetrain.config.errors import require, require_at_least, require_divides, require_one_of
from moetrain.config.moe import Activation, BalanceScope, CapacityOrder, RoundingRule, Score
from moetrain.config.train import OptimizerName
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.verify.batches import Domains
from moetrain.verify.layouts import EXPERT_WIDTH, NUM_HEADS, nearest_layouts

Mutation = Literal[
    "drop-holder", "average", "wrong-group", "scale-weight", "round-alone", "skip-tp-sum", "skip-tp-gather", "drop-part"
]
MUTATIONS: tuple[Mutation, ...] = get_args(Mutation)
VerifyDtype = Literal["float32", "float64"]  # a lower one has no tolerance worth proving with
MICRO_BATCH = 2  # packed rows of one rank and round
SEQ_LEN = 16
VOCAB_SIZE = 61
VOCAB_SIZE_ROUNDING = 997  # two documents that begin alike are a tie between tokens, which rounding has to break


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifySpec:
    """One comparison of a parallel run with the oracle. ``mesh`` and ``experts`` read like ``"dp=2"``."""

    ranks: int = 1
    mesh: str = ""
    experts: str = ""
    steps: int | None = None  # None: 3 with SGD, 1 with AdamW
    optimizer: OptimizerName = "sgd"
    dtype: VerifyDtype = "float32"
    router: Score = "softmax"
    balance: BalanceScope = "lagged"
    num_experts: int = 8
    top_k: int = 2
    num_groups: int = 1  # of experts, for group-limited routing
    groups_kept: int = 1
    shared_experts: int = 1
    dense_first: int = 1  # layers with a dense MLP, before those with experts
    moe_layers: int = 2  # after those
    activation: Activation = "swiglu"
    rounding: RoundingRule = "none"
    tile: int = 4  # rows of a tile, when rounding
    capacity_factor: float | None = None
    capacity_by: CapacityOrder = "weight"
    pad_to_capacity: bool = False
    two_level: bool = False
    ranks_per_node: int = 8
    dispatch_pieces: int = 1
    accumulation: int = 2  # rounds of one step
    rows: int | None = None  # packed rows of one step; None: all lanes full; fewer leave ranks without tokens
    tie_embeddings: bool = False
    activation_checkpoint: bool = False
    mutate: Mutation | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least("--ranks", self.ranks, 1)
        require_at_least("--accumulation", self.accumulation, 1)
        require_at_least("--seed", self.seed, 0)
        require_at_least("--shared-experts", self.shared_experts, 0)
        require_at_least("--dense-first", self.dense_first, 0)
        require_at_least("--moe-layers", self.moe_layers, 1)
        if self.steps is not None:
            require_at_least("--steps", self.steps, 1)
        if self.rows is not None:
            require_at_least("--rows", self.rows, 1)
        require_one_of("--optimizer", self.optimizer, get_args(OptimizerName))
        require_one_of("--dtype", self.dtype, get_args(VerifyDtype))
        if self.mutate is not None:
            require_one_of("--mutate", self.mutate, MUTATIONS)
        self.run_config()
        self._require_mutation_applies()

    @property
    def num_steps(self) -> int:
        """Optimizer steps to compare."""
        return self.steps if self.steps is not None else (1 if self.optimizer == "adamw" else 3)

    @property
    def num_rows(self) -> int:
        """Packed rows of one optimizer step over all ranks."""
        return self.rows if self.rows is not None else self.num_lanes * MICRO_BATCH * self.accumulation

    @property
    def num_lanes(self) -> int:
        """Ranks that compute different rows; a tp group shares its own."""
        return self.ranks // (self.mesh_config().tp or 1)

    def mesh_config(self) -> MeshConfig:
        """The resolved mesh.

        Raises:
            ValueError: the axes do not fit the ranks, or are not built; the nearest legal layouts are listed.
        """
        attention: dict[str, int] = {}
        experts: dict[str, int] = {}
        try:
            attention = parse_axes(self.mesh, "--mesh", ATTENTION_AXES)
            experts = parse_axes(self.experts, "--experts", EXPERT_AXES[1:])
            given: dict[str, Any] = {**attention, **experts}
            MeshConfig(**given)  # refuses what is not built
            require_divides("mesh.tp", attention.get("tp", 1), "model.num_heads", NUM_HEADS)
            require_divides("mesh.etp", experts.get("etp", 1), "moe.expert_width", EXPERT_WIDTH)
            self._require_fit("--mesh", math.prod(attention.values()), exact=True)
            shared = {"pp": attention.get("pp", 1), **experts}
            self._require_fit("--experts", math.prod(shared.values()), exact="edp" in experts)
            mesh = mesh_from_axes(attention, experts, ranks=self.ranks)
            mesh = replace(mesh, ranks_per_node=self.ranks_per_node, two_level=self.two_level)
            FoldedMesh.from_config(mesh, self.ranks)  # refuses nodes that are not alike
            return mesh
        except ValueError as error:
            nodes = self.ranks_per_node if self.two_level else None
            layouts = "; ".join(nearest_layouts(self.ranks, {**attention, **experts}, nodes_of=nodes))
            raise ValueError(f"{error}. Nearest legal layouts of --ranks {self.ranks}: {layouts}") from error

    def _require_fit(self, option: str, product: int, *, exact: bool) -> None:
        fits = self.ranks == product if exact else self.ranks % product == 0
        given = getattr(self, option.removeprefix("--")) or "nothing"
        bound = "" if exact else "a divisor of "
        require(
            fits,
            f"{option}: the axes must multiply to {bound}--ranks {self.ranks}, but {given!r} "
            f"gives {product}, since an unnamed axis is 1",
        )

    @property
    def vocab_size(self) -> int:
        """Token ids that occur."""
        return VOCAB_SIZE if self.rounding == "none" else VOCAB_SIZE_ROUNDING

    def two_levels_in_words(self) -> str:
        """What dispatch in two levels amounts to here: that it is one level where an ep group has no two of both."""
        mesh = FoldedMesh.from_config(self.mesh_config(), self.ranks)
        between, inside = len(mesh.group_of(0, "ep_between")), len(mesh.group_of(0, "ep_inside"))
        if between > 1 and inside > 1:
            return f"in two levels: {between} nodes of {inside} ranks in each ep group"
        where = "on one node" if between == 1 else "on as many nodes"
        return (
            f"in ONE level, though --two-level is given: the {mesh.ep} rank(s) of each ep group are {where}; choose "
            "--ranks-per-node, or ep, such that a group has several nodes with several ranks each"
        )

    def domains(self) -> Domains | None:
        """Whose tokens of a round rounding or capacity looks at together; None where nothing looks at a set.

        Dispatch groups when rounding, single ranks for capacity.
        """
        mesh = FoldedMesh.from_config(self.mesh_config(), self.ranks)
        if self.rounding != "none":
            groups = mesh.all_groups("ep")
            return Domains(mesh.tp, {rank: index for index, ranks in enumerate(groups) for rank in ranks})
        if self.capacity_factor is not None:
            return Domains(mesh.tp, {rank: rank for rank in range(self.ranks)})
        return None

    def run_config(self) -> RunConfig:
        """The scaled-down run: small, but with every feature of the model in it."""
        sigmoid = self.router == "sigmoid"
        return RunConfig(
            model=ModelConfig(
                vocab_size=self.vocab_size,
                num_layers=self.dense_first + self.moe_layers,
                dense_first=self.dense_first,
                dense_width=40,
                width=48,
                num_heads=NUM_HEADS,
                num_kv_heads=12,
                head_dim=8,
                norm_eps=1e-2,  # else a short vector makes rounding of float32 as large as the tolerance
                qk_norm=True,
                qkv_bias=True,
                tie_embeddings=self.tie_embeddings,
            ),
            moe=MoEConfig(
                num_experts=self.num_experts,
                top_k=self.top_k,
                expert_width=EXPERT_WIDTH,
                activation=self.activation,
                num_shared_experts=self.shared_experts,
                shared_gate=self.shared_experts > 0,
            ),
            router=RouterConfig(
                score=self.router,
                weight_scale=2.5 if sigmoid else 1.0,
                num_groups=self.num_groups,
                groups_kept=self.groups_kept,
            ),
            balance=BalanceConfig(scope=self.balance, coef=0.1, z_loss_coef=0.01, loss_free=sigmoid, bias_rate=0.05),
            dispatch=DispatchConfig(
                rounding=self.rounding,
                tile=self.tile,
                capacity_factor=self.capacity_factor,
                capacity_by=self.capacity_by,
                pad_to_capacity=self.pad_to_capacity,
                pieces=self.dispatch_pieces,
            ),
            mesh=self.mesh_config(),
            data=DataConfig(seq_len=SEQ_LEN, global_batch=self.num_rows, micro_batch=MICRO_BATCH),
            optim=self._optim(),
            train=TrainConfig(
                steps=self.num_steps + 3,
                dtype=self.dtype,
                device="cpu",
                activation_checkpoint=self.activation_checkpoint,
                threads=1,
            ),
            seed=self.seed,
        )

    def _optim(self) -> OptimConfig:
        """Clipping acts, and rates are large enough that a wrong gradient shows in the parameters.

        AdamW divides by |g| + eps in its first step. With the usual eps = 1e-8, rounding of a gradient that is truly
        zero would move a parameter by the whole learning rate; 1e-3 makes the update a well-conditioned function of
        the gradient, so that it can be held to the same tolerance.
        """
        if self.optimizer == "sgd":
            return OptimConfig(name="sgd", lr=1.0, warmup_steps=2, clip_norm=0.5)
        return OptimConfig(name="adamw", lr=0.02, warmup_steps=0, clip_norm=0.5, eps=1e-3)

    def _require_mutation_applies(self) -> None:
        mesh = self.mesh_config()
        if self.mutate in ("drop-holder", "average"):
            require(
                (mesh.edp or 1) > 1,
                f"--mutate {self.mutate} needs an expert with more than one holder, but edp is {mesh.edp}; "
                "choose ep smaller than the number of ranks",
            )
        if self.mutate == "wrong-group":
            require(
                self.num_lanes > 1,
                "--mutate wrong-group needs ranks that see different rows, but dp is 1; use --ranks 2 --mesh dp=2",
            )
        if self.mutate in ("skip-tp-sum", "skip-tp-gather"):
            require(
                mesh.tp > 1, f"--mutate {self.mutate} needs tensor parallelism, but tp is 1; use --ranks 2 --mesh tp=2"
            )
        if self.mutate == "drop-part":
            require(
                mesh.etp > 1, "--mutate drop-part needs experts in parts, but etp is 1; use --ranks 2 --experts etp=2"
            )
        if self.mutate == "round-alone":
            require(
                self.rounding != "none" and mesh.ep > 1,
                f"--mutate round-alone needs ranks that round together, but --rounding is {self.rounding} and ep is "
                f"{mesh.ep}; use --rounding nearest and ep of 2 or more",
            )

    def with_seed(self, seed: int) -> "VerifySpec":
        """The same comparison on other numbers."""
        return replace(self, seed=seed)
