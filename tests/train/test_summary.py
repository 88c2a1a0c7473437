import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moetrain.config import MeshConfig
from moetrain.data.manifest import Manifest
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.summary import Validation, make_summary


def test_every_axis_of_a_folding_is_told(corpus: Path) -> None:
    """Each has a size of its own, so that none can stand for another; those of each mesh give the number of ranks."""
    mesh = FoldedMesh.from_config(MeshConfig(dp_replicate=3, tp=8, edp=2, ep=4, etp=6), 48)
    engine: Any = SimpleNamespace(
        groups=SimpleNamespace(mesh=mesh),
        num_steps_done=7,
        num_skipped=1,
        num_parameters=lambda: 12,
        device=torch.device("cpu"),
        store=SimpleNamespace(compute_dtype=torch.bfloat16),
    )
    records = [
        {"step": step, "loss": float(step), "seconds": 2.0, "num_tokens": 10, "num_loss_tokens": 10} for step in (6, 7)
    ]
    records.append({"step": 8, "loss": 0.0, "seconds": 1.0, "num_tokens": 0, "num_loss_tokens": 0})  # had no document
    summary = make_summary(engine, records, Validation(1.5, 4, 9), 9.0, Manifest.read(corpus).entropies)
    axes = {"dp_replicate": 3, "dp_shard": 2, "tp": 8, "edp": 2, "ep": 4, "etp": 6, "world_size": 48}
    assert {name: summary[name] for name in axes} == axes
    assert (summary["train_loss"], summary["tokens_per_second"], summary["dtype"]) == (6.5, 4.0, "bfloat16")
    assert (summary["validation_loss"], summary["validation_rows"], summary["validation_rows_in_all"]) == (1.5, 4, 9)
    assert json.loads(json.dumps(summary)) == summary
