"""The whole configuration of one run, and the checks that need more than one part of it."""

from dataclasses import dataclass, field
from pathlib import Path

from moetrain.config.errors import require, require_at_least, require_divides
from moetrain.config.mesh import MeshConfig
from moetrain.config.model import ModelConfig, MoEConfig
from moetrain.config.train import CheckpointConfig, DataConfig, OptimConfig, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything a run needs; frozen, and valid once it exists."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 1234
    run_dir: Path = Path("runs/run")

    def __post_init__(self) -> None:
        require_at_least("seed", self.seed, 0)
        require(
            self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps ({self.optim.warmup_steps}) must be at most train.steps ({self.train.steps}); "
            "lower optim.warmup_steps",
        )
        self._check_parts()

    def _check_parts(self) -> None:
        """Every rank of a tp or etp group must have a part of what is cut over it."""
        tp, model, moe = self.mesh.tp, self.model, self.moe
        require_divides("mesh.tp", tp, "model.num_heads", model.num_heads)
        smallest = {"model.vocab_size": model.vocab_size}
        if model.dense_first:
            smallest["model.dense_width"] = model.dense_width
        if moe.shared_hidden:
            smallest["the shared experts' width"] = moe.shared_hidden
        for name, size in smallest.items():
            require(tp <= size, f"mesh.tp ({tp}) must be at most {name} ({size}), which is cut over it; lower mesh.tp")
        require_divides("mesh.etp", self.mesh.etp, "moe.expert_width", moe.expert_width)

    def validate_for(self, world_size: int) -> "MeshConfig":
        """Check what depends on the number of ranks, before any process group exists; return the resolved mesh."""
        divides = {"tp": self.model.num_heads, "etp": self.moe.expert_width}
        return self.mesh.resolve(world_size, divides=divides)
