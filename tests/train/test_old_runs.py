"""A run folder and a checkpoint of commit 8ad8183, before fields moved out of the ``moe`` table, still go on.

``run_of_8ad8183`` has the text of its files, the checkpoint's JSON and the first step's metrics, written on two ranks.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moetrain.config import RunConfig, load_run, to_toml
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.resume import not_resumable, remarks
from moetrain.train.run_folder import RunFolder

OLD = Path(__file__).parent / "run_of_8ad8183"
# The command as it was, but for the run folder, and as it would be written now.
OPTIONS = [
    "--preset",
    "tiny",
    "--data.path",
    "corpus",
    "--mesh.ep",
    "2",
    "--checkpoint.every",
    "10",
    "--train.threads",
    "1",
]
THEN = [
    "--moe.score", "sigmoid", "--moe.loss-free", "--moe.bias-rate", "0.01", "--moe.weight-scale", "2.5",
    "--moe.balance-scope", "micro", "--moe.capacity-factor", "1.25", "--moe.pad-to-capacity",
    "--moe.dispatch-pieces", "2", "--moe.num-groups", "2",
]  # fmt: skip
NOW = [
    "--router.score", "sigmoid", "--balance.loss-free", "--balance.bias-rate", "0.01", "--router.weight-scale", "2.5",
    "--balance.scope", "micro", "--dispatch.capacity-factor", "1.25", "--dispatch.pad-to-capacity",
    "--dispatch.pieces", "2", "--router.num-groups", "2",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "step-00000010").mkdir(parents=True)
    shutil.copy(OLD / "config.toml", folder.config)
    shutil.copy(OLD / "metrics.jsonl", folder.metrics)
    return folder


def extra() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((OLD / "checkpoint_extra.json").read_text())
    return loaded


def run_in(folder: RunFolder, options: list[str]) -> RunConfig:
    return replace(load_run([*OPTIONS, *options]), run_dir=folder.path)


@pytest.mark.parametrize("options", [THEN, NOW])
def test_the_folder_holds_the_same_run(folder: RunFolder, options: list[str]) -> None:
    folder.check(run_in(folder, options))


@pytest.mark.parametrize("options", [THEN, NOW])
def test_the_checkpoint_is_of_the_same_run(folder: RunFolder, options: list[str]) -> None:
    run, data = run_in(folder, options), extra()["data"]
    assert not_resumable(folder, extra(), run, data, "float32") == ""
    mesh = FoldedMesh.from_config(run.mesh, 2)
    assert remarks(extra(), run, mesh) == []


def test_another_run_is_still_refused_by_the_new_name(folder: RunFolder) -> None:
    other = run_in(folder, [*NOW, "--router.score", "softmax"])
    said = r"\(router\.score was 'sigmoid', is 'softmax'\)"
    with pytest.raises(ValueError, match=said):
        folder.check(other)
    assert "router.score was 'sigmoid', is 'softmax'" in not_resumable(
        folder, extra(), other, extra()["data"], "float32"
    )


def test_as_the_run_goes_on_its_file_gets_the_new_spelling(folder: RunFolder) -> None:
    run = run_in(folder, THEN)
    folder.write_config(run)
    assert folder.config.read_text().endswith(to_toml(run))
    assert "[router]" in folder.config.read_text()
    assert "balance_scope" not in folder.config.read_text()
