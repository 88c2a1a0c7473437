"""What a run does: data, optimizer, schedule, checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from moetrain.config.errors import require, require_at_least, require_in, require_one_of, require_storable

OptimizerName = Literal["adamw", "sgd"]
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where tokens come from. ``path`` is a folder that ``moetrain prep`` wrote."""

    path: Path = Path("corpora/quickstart")
    seq_len: int = 512  # S, tokens per packed row
    global_batch: int = 16  # packed rows per optimizer step, over all ranks
    micro_batch: int = 4  # packed rows per rank and forward pass
    domain_weights: dict[str, float] = field(default_factory=dict)  # empty: in proportion to tokens

    def __post_init__(self) -> None:
        require_storable("data.path", str(self.path))
        require_at_least("data.seq_len", self.seq_len, 2)
        require_at_least("data.global_batch", self.global_batch, 1)
        require_at_least("data.micro_batch", self.micro_batch, 1)
        for name, weight in self.domain_weights.items():
            require_storable("a name in data.domain_weights", name)
            require_at_least(f"data.domain_weights[{name!r}]", weight, 0.0)
        require(
            not self.domain_weights or sum(self.domain_weights.values()) > 0,
            f"data.domain_weights must have a positive sum, got {self.domain_weights}; "
            "give some domain a weight above 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW (or SGD) with warm-up and a cosine schedule. No decay on norms, biases, embeddings."""

    name: OptimizerName = "adamw"
    lr: float = 3e-3
    min_lr_ratio: float = 0.1  # the schedule ends at lr * min_lr_ratio
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0 turns clipping off

    def __post_init__(self) -> None:
        require_one_of("optim.name", self.name, get_args(OptimizerName))
        require(self.lr > 0, f"optim.lr must be positive, got {self.lr}; 3e-3 suits small models")
        require_in("optim.min_lr_ratio", self.min_lr_ratio, 0.0, 1.0)
        require_at_least("optim.warmup_steps", self.warmup_steps, 0)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}; 0.9 and 0.95 are usual")
        require(self.eps > 0, f"optim.eps must be positive, got {self.eps}; 1e-8 is usual")
        require_at_least("optim.weight_decay", self.weight_decay, 0.0)
        require_at_least("optim.clip_norm", self.clip_norm, 0.0, "0 turns clipping off")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length, precision and reporting of a run."""

    steps: int = 300
    # Of compute; masters are at least float32. "auto": bfloat16 where the device multiplies it natively, else float32.
    dtype: Dtype = "float32"
    device: Device = "auto"
    activation_checkpoint: bool = False
    # Dense layers are gathered for each forward and backward pass; False keeps them whole from a step's first forward
    # pass to its last backward pass: fewer collectives, one compute copy of every dense parameter more per rank.
    reshard_after_forward: bool = True
    eval_every: int = 100  # 0: only at the end
    eval_rows: int = 64  # packed rows of the validation set in evaluations along the way
    final_eval_rows: int = 0  # and in the one that ends the run; 0: the whole validation set
    log_every: int = 1
    threads: int = 0  # intra-op threads per rank on CPU; 0: cores / local ranks
    timeout_s: float = 600.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_at_least("train.steps", self.steps, 1)
        require_one_of("train.dtype", self.dtype, get_args(Dtype))
        require_one_of("train.device", self.device, get_args(Device))
        require_at_least("train.eval_every", self.eval_every, 0)
        require_at_least("train.eval_rows", self.eval_rows, 1)
        require_at_least("train.final_eval_rows", self.final_eval_rows, 0, "0 means the whole validation set")
        require_at_least("train.log_every", self.log_every, 1)
        require_at_least("train.threads", self.threads, 0)
        require(0 < self.timeout_s <= 1e6, f"train.timeout_s must be in (0, 1e6], got {self.timeout_s}; 600 is usual")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and whether a run goes on from the newest one."""

    every: int = 100  # steps; 0: only at the end
    keep: int = 2  # the newest this many stay; 0 keeps all
    resume: bool = True

    def __post_init__(self) -> None:
        require_at_least("checkpoint.every", self.every, 0)
        require_at_least("checkpoint.keep", self.keep, 0)
