"""What is left of a run when it ends: ``summary.json``."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import moetrain
from moetrain.data.entropy import Entropies
from moetrain.train.engine import Engine

LAST_STEPS = 20  # the train loss is the mean over so many


@dataclass(frozen=True, slots=True)
class Validation:
    """What an evaluation found, and on what.

    Attributes:
        loss: nats per token (per byte with the byte tokenizer); None without validation text.
        num_rows: packed rows that were evaluated.
        num_rows_in_all: those of the whole validation set.
    """

    loss: float | None
    num_rows: int
    num_rows_in_all: int


def make_summary(
    engine: Engine, records: Sequence[dict[str, Any]], validation: Validation, seconds: float, entropies: Entropies
) -> dict[str, Any]:
    """Results of a run and what to compare them with.

    Args:
        engine: after its last step.
        records: the whole run's metrics.
        validation: the last evaluation.
        seconds: wall-clock time of this process.
        entropies: of the bytes of the whole validation set.
    """
    steps = [record for record in records if "loss" in record]
    last = [record["loss"] for record in steps if record["num_loss_tokens"] > 0][-LAST_STEPS:]
    train_seconds = sum(record["seconds"] for record in steps)
    mesh = engine.groups.mesh
    return {
        "train_loss": sum(last) / max(1, len(last)),
        "validation_loss": validation.loss,
        "validation_rows": validation.num_rows,
        "validation_rows_in_all": validation.num_rows_in_all,
        "unigram_entropy": entropies.unigram,
        "bigram_entropy": entropies.bigram,
        "trigram_entropy": entropies.trigram,
        "tokens_per_second": sum(record["num_tokens"] for record in steps) / train_seconds if train_seconds else 0.0,
        "world_size": mesh.world_size,
        "dp_replicate": mesh.dp_replicate,
        "dp_shard": mesh.dp_shard,
        "tp": mesh.tp,
        "edp": mesh.edp,
        "ep": mesh.ep,
        "etp": mesh.etp,
        "steps": engine.num_steps_done,
        "skipped_steps": engine.num_skipped,
        "rows_added": sum(record.get("rows_added", 0) for record in steps),
        "rows_dropped": sum(record.get("rows_dropped", 0) for record in steps),
        "seconds": seconds,
        "train_seconds": train_seconds,
        "parameters": engine.num_parameters(),
        "device": engine.device.type,
        "dtype": str(engine.store.compute_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "moetrain": moetrain.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
