"""Every field by what it changes: a run goes on with what is free, and a model is one as long as its fields are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layer_configs import layer_config
from train.tiny_run import losses, make_run

from moetrain.config import OptimConfig, RunConfig
from moetrain.config.options import options
from moetrain.train.differences import (
    FREE_FIELDS,
    LEARNING_FIELDS,
    MODEL_FIELDS,
    START_FIELDS,
    config_differences,
    flat_config,
    model_differences,
    without_effect,
)
from moetrain.train.loop import train


def changed(run: RunConfig, **fields: Any) -> RunConfig:
    """``run`` with other values of fields, as ``optim__lr=0.5``."""
    for name, value in fields.items():
        table, _, field = name.rpartition("__")
        run = replace(run, **{table: replace(getattr(run, table), **{field: value})} if table else {field: value})
    return run


def test_every_field_is_of_one_kind() -> None:
    """A new field fails here until somebody has said what it changes."""
    kinds = [FREE_FIELDS, LEARNING_FIELDS, MODEL_FIELDS, START_FIELDS]
    assert sorted(name for kind in kinds for name in kind) == sorted(options())


def test_differences_name_old_and_new(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path / "run")
    assert config_differences(run, run) == []
    assert config_differences(run, replace(run, seed=9)) == ["seed was 1234, is 9"]


FREE: list[tuple[str, dict[str, object]]] = [
    ("train", {"activation_checkpoint": True}),
    ("train", {"eval_every": 7, "eval_rows": 2, "final_eval_rows": 9, "log_every": 3}),
    ("train", {"reshard_after_forward": False}),
    ("dispatch", {"pieces": 2}),
    ("dispatch", {"pad_to_capacity": True}),
    ("moe", {"recompute_hidden": True}),
    ("placement", {"planner": "moetrain", "slots": 1, "plan_every": "micro_batch", "move_owners_every": 5}),
    ("placement", {"planner": "hecate", "predictor": "mean", "rematerialise": "always", "trace": True}),
    ("mesh", {"tp": 2, "etp": 2, "two_level": True, "ranks_per_node": 2}),
]


@pytest.mark.parametrize(("part", "values"), FREE)
def test_what_changes_no_weight_may_change(part: str, values: dict[str, object], tmp_path: Path) -> None:
    """With fewer or smaller GPUs the same mathematics must fit otherwise."""
    run = make_run(tmp_path, tmp_path / "run", layer=layer_config(num_experts=6, top_k=2, capacity_factor=1.25))
    other = replace(run, **{part: replace(getattr(run, part), **values)})
    assert other != run
    assert config_differences(run, other) == config_differences(other, run) == []


@pytest.mark.parametrize(
    ("layer", "is_free"),
    [
        ({}, True),
        ({"loss_free": True, "score": "sigmoid", "dispatch_pieces": 2}, True),
        ({"balance_scope": "none"}, True),
        ({"balance_scope": "micro", "balance_coef": 0.0}, True),
        ({"balance_scope": "micro"}, False),
        ({"capacity_factor": 2.0}, False),
        ({"rounding": "nearest"}, False),
    ],
)
def test_micro_batches_may_change_where_nothing_looks_at_one(
    layer: dict[str, object], is_free: bool, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tmp_path / "run", layer=layer_config(num_experts=6, top_k=2, **layer))
    other = replace(run, data=replace(run.data, micro_batch=1))
    assert config_differences(run, other) == ([] if is_free else ["data.micro_batch was 2, is 1"])


OTHERWISE = {  # another value of each field that may have no effect
    "data.micro_batch": 3,
    "data.context": 99,
    "data.batch_tokens": 77,
    "data.seq_len": 16,
    "data.global_batch": 5,
    "balance.coef": 0.5,
    "balance.scope": "micro",
    "balance.bias_rate": 0.5,
    "dispatch.capacity_by": "position",
    "dispatch.tile": 8,
    "model.dense_width": 7,
    "optim.beta1": 0.1,
    "optim.beta2": 0.1,
    "optim.eps": 0.5,
    "router.group_rule": "max",
    "router.renormalise": False,
    "train.steps": 9,
}


@pytest.mark.dist
@pytest.mark.parametrize(
    "wanted",
    [
        {"balance__scope": "none", "model__dense_first": 0, "optim": OptimConfig(name="sgd", warmup_steps=2)},
        {"optim": OptimConfig(min_lr_ratio=1.0, warmup_steps=2), "data__micro_batch": 2},
    ],
)
def test_what_nothing_reads_changes_no_bit(wanted: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """Two runs that differ in all of it at once learn the same, so that one may go on as the other."""
    run = changed(make_run(corpus, tmp_path / "one", steps=2), **wanted)
    idle = without_effect(run)
    fields = {name.replace(".", "__"): OTHERWISE[name] for name in idle - {"data.micro_batch", "train.steps"}}
    other = replace(changed(run, **fields), run_dir=tmp_path / "other")
    assert config_differences(run, other) == []
    assert len([name for name in flat_config(run) if flat_config(run)[name] != flat_config(other)[name]]) > 3
    train(run)
    train(other)
    assert losses(run.run_dir) == losses(other.run_dir)
    assert config_differences(run, changed(run, **{name.replace(".", "__"): OTHERWISE[name] for name in idle})) == []


def test_every_field_that_may_have_no_effect_counts_where_it_has_one(tmp_path: Path) -> None:
    layer = layer_config(num_experts=6, top_k=2, capacity_factor=2.0, num_groups=3, groups_kept=2, loss_free=True)
    looks = make_run(tmp_path, tmp_path / "run", layer=layer)  # its first layer is dense
    rounds = changed(looks, dispatch=layer_config(rounding="nearest").dispatch)
    documents = changed(looks, data__packing="documents")
    assert {"data.seq_len", "data.global_batch", "data.micro_batch"} <= without_effect(documents)
    for name, value in OTHERWISE.items():
        run = {"dispatch.tile": rounds, "data.context": documents, "data.batch_tokens": documents}.get(name, looks)
        assert len(config_differences(run, changed(run, **{name.replace(".", "__"): value}))) == 1, name


def test_another_model_is_one_whose_weights_mean_something_else(tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path / "run")
    learns = changed(run, optim__lr=0.5, seed=3, data__seq_len=64, train__steps=99, balance__coef=0.5)
    assert len(config_differences(run, learns)) == 5
    assert model_differences(run, learns) == []
    assert model_differences(run, changed(run, moe__top_k=1)) == ["moe.top_k was 2, is 1"]
    wider = changed(run, model__rope_theta=5e5, moe__shared_width=8)
    assert model_differences(run, wider) == [
        "model.rope_theta was 10000.0, is 500000.0",
        "moe.shared_width was None, is 8",
    ]


def test_weights_of_domains_are_compared_one_by_one(tmp_path: Path) -> None:
    run = changed(make_run(tmp_path, tmp_path / "run"), data__domain_weights={"a": 1.0, "b": 2.0})
    other = changed(run, data__domain_weights={"a": 1.0, "c": 2.0})
    assert config_differences(run, other) == [
        "data.domain_weights.b was 2.0, is None",
        "data.domain_weights.c was None, is 2.0",
    ]
