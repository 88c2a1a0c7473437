"""A checkpoint of commit 8ad8183, which kept the balance of all MoE layers as one tensor, still goes on.

``checkpoint_of_8ad8183`` was written by that commit on two ranks (ep=2), after two steps on the corpus of ``tiny_run``.
``then.json`` has what it said of balance then, and of its next two steps.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from layer_configs import layer_config
from ranks import run_on_ranks
from train.tiny_run import do_step, make_corpus, make_engine

from moetrain.checkpoint import Manifest
from moetrain.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from moetrain.train.engine import Engine
from moetrain.train.state import load_engine, save_engine

OLD = Path(__file__).parent / "checkpoint_of_8ad8183"
THEN: dict[str, Any] = json.loads((OLD / "then.json").read_text())

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def engine_of(corpus: Path, mesh: dict[str, Any]) -> Engine:
    layer = layer_config(num_experts=4, top_k=2, expert_width=4, score="sigmoid", loss_free=True, bias_rate=0.01)
    model = ModelConfig(
        num_layers=3,
        width=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        dense_first=1,
        dense_width=8,
        tie_embeddings=True,
    )  # fmt: skip
    run = RunConfig(
        model=model,
        moe=layer.moe,
        router=layer.router,
        balance=layer.balance,
        dispatch=layer.dispatch,
        mesh=MeshConfig(**mesh),
        data=DataConfig(path=corpus, seq_len=16, global_batch=4, micro_batch=2),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=6, device="cpu", threads=1, dtype="float32"),
    )
    return make_engine(run, dist.get_world_size())


def stacked(engine: Engine) -> dict[str, list[list[float]]]:
    balance = engine.balance.state_dict().values()
    return {f"{name}LE": [kept[f"{name}E"].tolist() for kept in balance] for name in ("lagged_count_", "bias_")}


def go_on(rank: int, corpus: Path, mesh: dict[str, Any], folder: Path) -> dict[str, Any]:
    engine = engine_of(corpus, mesh)
    load_engine(engine, OLD / "step-00000002", dist.group.WORLD)
    found: dict[str, Any] = {"balance": stacked(engine)}
    path = save_engine(engine, folder, dist.group.WORLD)
    found["keys"] = sorted(name for name in Manifest.read(path).tensors if name.startswith("balance."))
    again = engine_of(corpus, mesh)
    load_engine(again, path, dist.group.WORLD)
    found["saved again"] = stacked(again)
    reports = [do_step(engine) for _ in range(2)]
    forgetful = engine_of(corpus, mesh)
    load_engine(forgetful, OLD / "step-00000002", dist.group.WORLD)
    forgetful.balance.load_state_dict(engine_of(corpus, mesh).balance.state_dict())
    return found | {
        "balance_after": stacked(engine),
        "losses": [report.loss for report in reports],
        "aux": [report.aux for report in reports],
        "grad_norms": [report.grad_norm for report in reports],
        "aux without balance": do_step(forgetful).aux,
    }


@pytest.mark.parametrize(("ranks", "mesh"), [(1, {}), (2, {"ep": 2}), (2, {"etp": 2})], ids=str)
def test_it_goes_on_as_it_would_have_then(ranks: int, mesh: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    for found in run_on_ranks(ranks, go_on, corpus, mesh, tmp_path):
        assert found["balance"] == found["saved again"] == THEN["balance"]
        assert found["balance_after"] == THEN["balance_after"]
        for name in ("losses", "aux", "grad_norms"):
            assert found[name] == pytest.approx(THEN[name], rel=1e-5)
        assert found["aux without balance"] != pytest.approx(THEN["aux"][0], rel=1e-3), "balance matters here"
        assert found["keys"] == [
            f"balance.layers.{layer}.{name}" for layer in (1, 2) for name in ("bias_E", "lagged_count_E")
        ]


def of_another_model(rank: int, corpus: Path) -> str:
    engine = engine_of(corpus, {})
    engine.balance._layers = {0: engine.balance[1], **engine.balance._layers}
    object.__setattr__(engine.run.model, "dense_first", 0)
    try:
        load_engine(engine, OLD / "step-00000002", dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_of_another_number_of_layers_it_is_refused(corpus: Path) -> None:
    (said,) = run_on_ranks(1, of_another_model, corpus)
    assert "balance.bias_LE must be [3, 4], the checkpoint has [2, 4]" in said
