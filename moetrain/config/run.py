"""The whole configuration of one run, and the checks that need more than one part of it."""

from dataclasses import dataclass, field
from pathlib import Path

from moetrain.config.errors import require, require_storable
from moetrain.config.fields import check_fields, setting
from moetrain.config.mesh import ATTENTION_AXES, EXPERT_AXES, MeshConfig
from moetrain.config.model import ModelConfig
from moetrain.config.moe import BalanceConfig, DispatchConfig, MoEConfig, MoELayerConfig, RouterConfig
from moetrain.config.placement import PlacementConfig
from moetrain.config.sequence import SequenceConfig, largest_share_up_to
from moetrain.config.train import CheckpointConfig, DataConfig, OptimConfig, StartConfig, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The whole run: tables of fields, a seed, and a folder.

    It is valid once it exists, but for what the number of ranks decides: ``validate_for``.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    start: StartConfig = field(default_factory=StartConfig)
    seed: int = setting(1234, "Seed of initial weights, of the order of data, and of all that is drawn.", least=0)
    run_dir: Path = setting(Path("runs/run"), "Folder of the run: its configuration, metrics, summary and checkpoints.")

    def __post_init__(self) -> None:
        check_fields(self)
        require_storable("run_dir", str(self.run_dir))
        _ = self.layer_config  # checks the tables of an MoE layer together
        require(
            self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps ({self.optim.warmup_steps}) must be at most train.steps ({self.train.steps}); "
            "lower optim.warmup_steps",
        )
        placement = self.placement
        require(
            not placement.moves or placement.slots <= self.moe.num_experts,
            f"placement.slots ({placement.slots}) must be at most moe.num_experts ({self.moe.num_experts}), since a "
            "rank holds an expert once; lower placement.slots",
        )
        require(
            not (placement.calibrate and self.dispatch.pad_to_capacity),
            "placement.calibrate reads loads after the router, for which the host waits, but "
            "dispatch.pad_to_capacity promises that it never waits; set one of them to false",
        )

        self._check_sequences()

    @property
    def plans_tokens(self) -> bool:
        """Whether rounds are filled by tokens, up to a capacity, instead of by rows."""
        return self.data.packing == "documents" or self.sequence.weighs_work

    @property
    def capacity(self) -> int:
        """Tokens whose activations a rank can hold in one round."""
        if self.sequence.capacity is not None:
            return self.sequence.capacity
        if self.data.packing == "rows":
            return self.data.micro_batch * self.data.seq_len
        return largest_share_up_to(self.data.context, self.mesh.cp)

    @property
    def most_tokens(self) -> int:
        """Tokens of a rank and round at most: what waits on the host takes no room, but for two layers' worth."""
        layers, offload = self.model.num_layers, self.sequence.offload
        if layers <= 2 or offload == 0:
            return self.capacity
        return int(self.capacity * layers / (2 + (1 - offload) * (layers - 2)) + 1e-9)

    @property
    def layer_config(self) -> MoELayerConfig:
        """The tables of an MoE layer as one thing."""
        return MoELayerConfig(moe=self.moe, router=self.router, balance=self.balance, dispatch=self.dispatch)

    def validate_for(self, world_size: int) -> MeshConfig:
        """Check what depends on the number of ranks, before any process group exists; return the resolved mesh.

        Raises:
            ValueError: the axes do not fit the ranks, or a rank of a tp or etp group would have no part, or not a whole
                one, of what is cut over it; the nearest legal axes are listed.
        """
        tp, heads, width = self.mesh.tp, self.model.num_heads, self.moe.expert_width
        cut = self._cut_over_tp()
        fits = {
            "tp": lambda size: heads % size == 0 and size <= min(cut.values()),
            "etp": lambda size: width % size == 0,
        }
        mesh = self.mesh.resolve(world_size, fits=fits)
        self._check_longest(world_size // (mesh.pp * tp))
        legal = f"; nearest legal axes: {self.mesh.nearest_legal(ATTENTION_AXES, world_size, fits=fits)}"
        require(heads % tp == 0, f"mesh.tp ({tp}) must divide model.num_heads ({heads}){legal}")
        for name, size in cut.items():
            require(tp <= size, f"mesh.tp ({tp}) must be at most {name} ({size}), which is cut over it{legal}")
        legal = f"; nearest legal axes: {self.mesh.nearest_legal(EXPERT_AXES, world_size, fits=fits)}"
        require(width % mesh.etp == 0, f"mesh.etp ({mesh.etp}) must divide moe.expert_width ({width}){legal}")
        return mesh

    def _check_sequences(self) -> None:
        planner, cp = self.sequence.planner, self.mesh.cp
        require(
            cp == 1 or planner == "context",
            f"mesh.cp ({cp}) is how many ranks share each sequence under sequence.planner context, but the planner is "
            f"{planner}; " + ("set mesh.cp to 1" if planner != "data" else "set sequence.planner to context"),
        )
        require(
            not self.sequence.has_gangs or self.balance.scope != "micro" or self.balance.coef == 0,
            f"balance.scope micro looks at a rank's tokens alone, but under sequence.planner {planner} ranks share "
            "sequences; set balance.scope to lagged, or sequence.planner to data",
        )
        require(
            self.plans_tokens or self.sequence.capacity is None,
            f"sequence.capacity ({self.sequence.capacity}) is not asked for where rounds are filled by rows, "
            "data.micro_batch of them; leave it out, or choose data.packing documents, or another sequence.planner",
        )
        require(
            not self.dispatch.pad_to_capacity
            or self.data.packing == "documents"
            or (cp == 1 and not self.sequence.weighs_work),
            "dispatch.pad_to_capacity sizes messages by the tokens of a round, but how many of a row's a rank has "
            "follows from where its documents end if ranks may share rows (sequence.planner "
            f"{self.sequence.planner}); set data.packing to documents, dispatch.pad_to_capacity to false, or "
            "sequence.planner to data",
        )
        require(
            not (self.dispatch.pad_to_capacity and self.sequence.offload > 0),
            f"sequence.offload ({self.sequence.offload}) lets rounds have more tokens than sequence.capacity, by which "
            "dispatch.pad_to_capacity sizes messages; set one of them to 0 or false",
        )
        if self.plans_tokens and not self.sequence.weighs_work:
            share, longest = largest_share_up_to(self.data.longest, cp), self.data.longest
            require(
                share <= self.most_tokens,
                f"sequence.capacity ({self.capacity}) must hold what one of the {cp} rank(s) that share a sequence has "
                f"of one of up to {longest} tokens, {share}; raise it, or set sequence.planner to moetrain",
            )

    def _check_longest(self, num_lanes: int) -> None:
        """Refuse sequences that all ranks together cannot hold."""
        share = largest_share_up_to(self.data.longest, num_lanes)
        require(
            not self.sequence.weighs_work or share <= self.most_tokens,
            f"sequence.capacity ({self.capacity}) times the {num_lanes} rank(s) that may share a sequence must hold "
            f"the longest one, of {self.data.longest} tokens; raise sequence.capacity, lower "
            f"{'data.context' if self.data.packing == 'documents' else 'data.seq_len'}, or start more ranks",
        )

    def _cut_over_tp(self) -> dict[str, int]:
        """Sizes of what ranks of a tp group share out in pieces of any size, each at least one."""
        sizes = {"model.vocab_size": self.model.vocab_size}
        if self.model.dense_first:
            sizes["model.dense_width"] = self.model.dense_width
        if self.moe.shared_hidden:
            sizes["the shared experts' width"] = self.moe.shared_hidden
        return sizes
