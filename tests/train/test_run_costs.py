"""Costs of a run's own layers: what is sampled, who is asked, and that plans follow from them, also on resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.utils.flop_counter import FlopCounterMode
from train.tiny_run import make_engine, make_run

from moetrain.checkpoint import Manifest as CheckpointManifest
from moetrain.config import MeshConfig, PlacementConfig, RunConfig
from moetrain.cost.measure import Peers
from moetrain.cost.step_costs import UNMEASURED, StepCosts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.placement.trace import Trace
from moetrain.train import loop
from moetrain.train.loop import train
from moetrain.train.metrics import MetricsLog
from moetrain.train.placing_state import KEY
from moetrain.train.run_costs import attention_flops, layer_sample, measure_run_costs, peers_of

MEASURED = StepCosts(0.5, 0.25, 0.125, 2.0, 4.0, 1.0)


def placed(run: RunConfig, **placement: Any) -> RunConfig:
    return replace(run, placement=PlacementConfig(**placement))


def costs_body(rank: int, corpus: Path, etp: int) -> tuple[StepCosts, dict[str, Any], bool]:
    mesh = MeshConfig(ep=4 // etp, etp=etp, ranks_per_node=2)
    engine = make_engine(placed(make_run(corpus, corpus / "unused", mesh=mesh), planner="moetrain"), 4)
    before = torch.get_rng_state()
    assert engine.placing.costs == UNMEASURED, "engines are deterministic until somebody measures"
    costs, sample = measure_run_costs(engine), layer_sample(engine)
    engine.placing.use_costs(costs)
    assert engine.placing.setup.costs == engine.placing.costs == costs
    facts = {"row_bytes": sample.row_bytes, "expert_bytes": sample.expert_bytes, "hides": sample.hides}
    drew = not torch.equal(before, torch.get_rng_state())
    engine.placing.close()
    return costs, facts | {"pair_flops": sample.pair_flops}, drew


@pytest.mark.dist
@pytest.mark.parametrize("etp", [1, 2])
def test_all_ranks_measure_one_thing_with_the_runs_sizes(etp: int, corpus: Path) -> None:
    """Width 32, hidden 24, gated; bytes of a shard, in the type of compute and back in float32."""
    found = run_on_ranks(4, costs_body, corpus, etp)
    assert len({costs for costs, _, _ in found}) == 1
    costs, facts, _ = found[0]
    assert min(costs.pair_s, costs.near_row_s, costs.far_row_s, costs.weight_byte_s) > 0
    assert costs.overlap_s == 0, "gloo hides nothing"
    elements, size = 3 * 24 * 32 // etp, facts["row_bytes"] // 32
    assert size in (2, 4)
    assert facts == {
        "row_bytes": 32 * size, "expert_bytes": elements * (size + 4), "hides": False, "pair_flops": 6.0 * elements,
    }  # fmt: skip
    assert costs.expert_bytes == facts["expert_bytes"]
    assert not any(drew for _, _, drew in found), "a run draws what it would have drawn"


@pytest.mark.parametrize(
    ("ranks", "per_node", "peers"),
    [(1, 8, (None, None)), (8, 8, (1, None)), (8, 4, (1, 4)), (2, 1, (None, 1)), (16, 8, (1, 8))],
)
def test_peers_are_on_the_first_node_and_the_next(ranks: int, per_node: int, peers: tuple[int | None, ...]) -> None:
    assert peers_of(FoldedMesh(dp_shard=ranks, ep=ranks, ranks_per_node=per_node)) == Peers(*peers)


def test_attention_is_counted_as_torch_counts_it(tmp_path: Path) -> None:
    """Projections as products; scores of a causal row are half of what torch counts for the whole square."""
    run = make_run(tmp_path, tmp_path)
    model, tokens = run.model, run.data.micro_batch * run.data.seq_len
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    with FlopCounterMode(display=False) as counter:
        x_TD = torch.zeros(tokens, model.width)
        for width in (queries, keys, keys):
            x_TD @ torch.zeros(model.width, width)
        torch.zeros(tokens, queries) @ torch.zeros(queries, model.width)
        projections = counter.get_total_flops()
        for _ in range(run.data.micro_batch * model.num_heads):
            row = torch.zeros(run.data.seq_len, model.head_dim)
            (row @ row.T) @ row
        scores = counter.get_total_flops() - projections
    assert attention_flops(run) == 3 * (projections + scores / 2)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("placement", "measures"),
    [
        ({}, 0),
        ({"planner": "full"}, 0),
        ({"planner": "random"}, 0),
        ({"planner": "hecate"}, 1),
        ({"planner": "moetrain"}, 1),
        ({"trace": True}, 1),
    ],
)
def test_a_run_measures_where_something_depends_on_it(
    placement: dict[str, Any], measures: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[StepCosts] = []

    def measured(engine: Any) -> StepCosts:
        seen.append(engine.placing.costs)
        return MEASURED

    monkeypatch.setattr(loop, "measure_run_costs", measured)
    train(placed(make_run(corpus, tmp_path / "run", steps=2), **placement))
    assert seen == [UNMEASURED] * measures
    if placement.get("trace"):
        assert Trace.load(tmp_path / "run").facts.costs == MEASURED.to_dict()


@pytest.mark.dist
def test_a_pair_costs_what_the_sample_took(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of the sample computes gradients of all of its inputs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine = make_engine(make_run(corpus, corpus / "unused", mesh=MeshConfig()), 1)
        sample = layer_sample(engine)
        grads = sample.compute()
        assert isinstance(grads, tuple)
        assert [tuple(grad.shape) for grad in grads] == [
            (sample.num_pairs, 32), (sample.num_pairs,), (2, 2, 24, 32), (2, 32, 24),
        ]  # fmt: skip
        assert all(bool(grad.isfinite().all()) and float(grad.abs().max()) > 0 for grad in grads)
        engine.placing.close()
        engine.groups.close()
    finally:
        dist.destroy_process_group()


@pytest.mark.dist
def test_a_resumed_run_weighs_by_the_costs_that_it_began_with(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: other costs make other plans."""
    seen: list[StepCosts] = []

    def measured(engine: Any) -> StepCosts:
        seen.append(replace(MEASURED, pair_s=1.0 + len(seen)))
        return seen[-1]

    monkeypatch.setattr(loop, "measure_run_costs", measured)
    run = placed(make_run(corpus, tmp_path / "run", steps=4), planner="moetrain", trace=True)
    train(run)
    (tmp_path / "run" / "checkpoints" / "step-00000004").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "summary.json").unlink()
    train(run)
    assert len(seen) == 1
    records = MetricsLog(tmp_path / "run" / "metrics.jsonl").records()
    errors = [record.get("prediction_error") for record in records if "loss" in record]
    assert errors[0] is None, "nothing was expected yet"
    assert all(error is not None and 0 <= error <= 2 for error in errors[1:])
    assert Trace.load(tmp_path / "run").facts.costs == seen[0].to_dict()
    newest = CheckpointManifest.read(tmp_path / "run" / "checkpoints" / "step-00000004").extra[KEY]
    assert newest["costs"] == seen[0].to_dict()
