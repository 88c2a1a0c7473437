"""The whole configuration of one run, and the checks that need more than one part of it."""

from dataclasses import dataclass, field
from pathlib import Path

from moetrain.config.errors import require, require_at_least
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

    def validate_for(self, world_size: int) -> "MeshConfig":
        """Check what depends on the number of ranks, before any process group exists; return the resolved mesh."""
        return self.mesh.resolve(world_size)
