"""What a run does: data, optimizer, schedule, checkpoints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moetrain.config.errors import require, require_storable
from moetrain.config.fields import about, check_fields, setting

OptimizerName = Literal["adamw", "sgd"]
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Device = Literal["auto", "cpu", "cuda"]
Packing = Literal["rows", "documents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Tokens: where they come from, and how many make a step."""

    path: Path = setting(Path("corpora/quickstart"), "Folder of the dataset, which `moetrain prep` wrote.")
    packing: Packing = setting(
        "rows",
        "What a sequence is: a row of data.seq_len tokens, which documents are laid end to end in, or a document, cut "
        "at data.context alone.",
    )
    seq_len: int = setting(512, "Tokens of a packed row (S).", unit="tokens", least=2)
    global_batch: int = setting(16, "Packed rows of an optimizer step, over all ranks.", unit="rows", least=1)
    micro_batch: int = setting(4, "Packed rows of one rank's forward pass.", unit="rows", least=1)
    context: int = setting(2048, "Tokens of the longest document; a longer one is cut.", unit="tokens", least=2)
    batch_tokens: int = setting(
        8192,
        "Tokens of an optimizer step where sequences are documents, over all ranks: those documents whose first token "
        "is among them.",
        unit="tokens",
        least=1,
    )
    domain_weights: dict[str, float] = field(
        default_factory=dict,
        metadata=about(
            "Shares of the domains in a batch by name, on any scale; none given takes them in proportion to tokens.",
            least=0.0,
        ),
    )

    def __post_init__(self) -> None:
        require_storable("data.path", str(self.path))
        check_fields(self, "data")
        for name in self.domain_weights:
            require_storable("a name in data.domain_weights", name)
        require(
            not self.domain_weights or sum(self.domain_weights.values()) > 0,
            f"data.domain_weights must have a positive sum, got {self.domain_weights}; "
            "give some domain a weight above 0",
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.seq_len if self.packing == "rows" else self.context

    @property
    def batch_size(self) -> int:
        """What a step takes of the data: rows, or tokens that documents may begin at."""
        return self.global_batch if self.packing == "rows" else self.batch_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW or SGD, with warm-up and a cosine schedule; norms, biases and embeddings do not decay."""

    name: OptimizerName = setting("adamw", "AdamW, or stochastic gradient descent without momentum.")
    lr: float = setting(3e-3, "Learning rate at the end of warm-up.", above=0, cure="3e-3 suits small models")
    min_lr_ratio: float = setting(0.1, "Share of lr that the cosine ends at.", least=0.0, most=1.0)
    warmup_steps: int = setting(
        20, "Steps in which the learning rate rises to lr, at most train.steps.", unit="steps", least=0
    )
    beta1: float = setting(
        0.9, "AdamW's decay of the mean gradient per step.", least=0, below=1, cure="0.9 and 0.95 are usual"
    )
    beta2: float = setting(
        0.95, "AdamW's decay of the mean square gradient per step.", least=0, below=1, cure="0.9 and 0.95 are usual"
    )
    eps: float = setting(
        1e-8, "Added to the root of that mean square, which AdamW divides by.", above=0, cure="1e-8 is usual"
    )
    weight_decay: float = setting(0.1, "Part of each matrix that decays per step, times the learning rate.", least=0.0)
    clip_norm: float = setting(
        1.0, "Norm that a longer gradient is scaled to; 0 never scales.", least=0.0, cure="0 turns clipping off"
    )

    def __post_init__(self) -> None:
        check_fields(self, "optim")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length, precision, memory and reports of a run."""

    steps: int = setting(300, "Optimizer steps of the whole run.", unit="steps", least=1)
    dtype: Dtype = setting(
        "float32",
        "Type of compute, masters are at least float32; auto is bfloat16 where the device multiplies it natively, else "
        "float32.",
    )
    device: Device = setting("auto", "Where ranks compute; auto is cuda where there is a GPU.")
    activation_checkpoint: bool = setting(
        False, "Compute each layer again in the backward pass: less memory, more time."
    )
    reshard_after_forward: bool = setting(
        True,
        "Gather dense layers for each forward and backward pass; false keeps them whole during a step: fewer "
        "collectives, one compute copy of every dense parameter more per rank.",
    )
    eval_every: int = setting(100, "Steps between evaluations; 0 evaluates at the end alone.", unit="steps", least=0)
    eval_rows: int = setting(
        64, "Packed rows of the validation set, or documents, in evaluations along the way.", unit="rows", least=1
    )
    final_eval_rows: int = setting(
        0,
        "Packed rows, or documents, in the evaluation that ends the run; 0 takes the whole validation set.",
        unit="rows",
        least=0,
        cure="0 means the whole validation set",
    )
    log_every: int = setting(1, "Steps between lines where the output is no terminal.", unit="steps", least=1)
    threads: int = setting(
        0, "Threads of a rank on the CPU; 0 shares the cores among the ranks of a machine.", unit="threads", least=0
    )
    timeout_s: float = setting(
        600.0,
        "How long a rank waits for others before it fails.",
        unit="seconds",
        above=0,
        most=1e6,
        cure="600 is usual",
    )
    overwrite: bool = setting(False, "Replace the run that the run folder holds.")

    def __post_init__(self) -> None:
        check_fields(self, "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Times at which checkpoints are written, and whether a run goes on from the newest."""

    every: int = setting(100, "Steps between checkpoints; 0 writes one at the end alone.", unit="steps", least=0)
    keep: int = setting(2, "Newest checkpoints that stay; 0 keeps all.", unit="checkpoints", least=0)
    resume: bool = setting(True, "Go on from the run folder's newest checkpoint.")

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """Checkpoint of another run that this one starts from, and what it takes besides the weights."""

    checkpoint: Path | None = setting(
        None, "What to start from: RUN@STEP, or RUN for its newest, RUN being a run's folder; or a checkpoint's folder."
    )
    optimizer: bool = setting(True, "Take the optimizer's moments too, where it has them.")
    position: bool = setting(
        True,
        "Count on from its step, in the schedule of the learning rate and in the data; false begins both anew.",
    )
    sha256: str | None = setting(
        None, "Written by a run: what its metadata.json states, to know it again in a moved folder."
    )

    def __post_init__(self) -> None:
        require_storable("start.checkpoint", str(self.checkpoint))
        check_fields(self, "start")
