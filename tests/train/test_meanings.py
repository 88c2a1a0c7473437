"""What a run learns is compared, not the words that say so: other words change no bit, and what changes one counts."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_configs import layer_config
from safetensors.torch import load_file
from torch import Tensor
from train.tiny_run import losses, make_run

from moetrain.checkpoint import list_checkpoints
from moetrain.config import RunConfig, StartConfig
from moetrain.data.dataset import PackedDataset
from moetrain.data.mixing import PERIOD
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.train.differences import config_differences, looks_at_micro_batches, model_differences
from moetrain.train.loop import train
from moetrain.train.source import find_source

Fields = dict[str, Any]


def changed(run: RunConfig, **fields: Any) -> RunConfig:
    """``run`` with other values of fields, as ``optim__lr=0.5``; those of one table at once."""
    tables: dict[str, Fields] = {}
    for name, value in fields.items():
        table, _, field = name.partition("__")
        tables.setdefault(table, {})[field] = value
    return replace(run, **{table: replace(getattr(run, table), **values) for table, values in tables.items()})


def run_of(corpus: Path, run_dir: Path, fields: Fields) -> RunConfig:
    layer = layer_config(num_experts=6, top_k=2, expert_width=24)
    return changed(make_run(corpus, run_dir, steps=3, layer=layer), **fields)


SAME: dict[str, tuple[Fields, Fields]] = {
    "the shared width by number and itself": ({"moe__num_shared_experts": 1}, {"moe__shared_width": 24}),
    "weights that sum to 1 as they are": (
        {"router__score": "topk_softmax"},
        {"router__score": "topk_softmax", "router__renormalise": False},
    ),
    "no loss by factor and by scope": ({"balance__coef": 0.0}, {"balance__scope": "none", "balance__coef": 0.5}),
    "another scope of no loss, another micro-batch": (
        {"balance__coef": 0.0, "balance__scope": "micro", "data__micro_batch": 1},
        {"balance__coef": 0.0, "data__micro_batch": 2},
    ),
    "another micro-batch of no loss": (
        {"balance__coef": 0.0, "balance__scope": "micro", "data__micro_batch": 2},
        {"balance__coef": 0.0, "balance__scope": "micro", "data__micro_batch": 1},
    ),
    "all groups kept and none": (
        {"router__num_groups": 3, "router__groups_kept": 3, "router__group_rule": "max"},
        {},
    ),
}


def learnt(run: RunConfig) -> tuple[dict[int, float], dict[str, Tensor]]:
    """The losses of its steps, and all that its last checkpoint holds."""
    files = list_checkpoints(run.run_dir / "checkpoints")[-1].glob("*.safetensors")
    return losses(run.run_dir), {key: value for file in files for key, value in load_file(file).items()}


@pytest.mark.dist
@pytest.mark.parametrize("words", SAME)
def test_other_words_for_it_change_no_bit(words: str, corpus: Path, tmp_path: Path) -> None:
    one, other = (run_of(corpus, tmp_path / name, fields) for name, fields in zip("ab", SAME[words], strict=True))
    assert config_differences(one, other) == config_differences(other, one) == []
    for run in (one, other):
        train(run)
    (loss, state), (other_loss, other_state) = learnt(one), learnt(other)
    if one.data.micro_batch != other.data.micro_batch:  # as ever where nothing looks at one: but for the order of sums
        assert loss == pytest.approx(other_loss, rel=1e-6)
        return
    assert loss == other_loss
    assert state.keys() == other_state.keys()
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())


OTHER: list[tuple[Fields, Fields, list[str]]] = [
    (
        {"moe__num_shared_experts": 1},
        {"moe__shared_width": 25},
        ["moe.num_shared_experts was 1, is 0", "moe.shared_width was None, is 25"],
    ),
    ({"moe__num_shared_experts": 1}, {}, ["moe.num_shared_experts was 1, is 0"]),
    (
        {"moe__num_shared_experts": 1},
        {"moe__num_shared_experts": 1, "moe__expert_width": 48},
        ["moe.expert_width was 24, is 48"],
    ),
    ({}, {"router__renormalise": False}, ["router.renormalise was True, is False"]),
    (
        {"router__score": "sigmoid"},
        {"router__score": "sigmoid", "router__renormalise": False},
        ["router.renormalise was True, is False"],
    ),
    ({"balance__coef": 0.0}, {"balance__coef": 0.01}, ["balance.coef was 0.0, is 0.01"]),
    ({"balance__scope": "none"}, {"balance__scope": "micro"}, ["balance.scope was 'none', is 'micro'"]),
    (
        {"balance__scope": "micro"},
        {"balance__scope": "micro", "data__micro_batch": 1},
        ["data.micro_batch was 2, is 1"],
    ),
    (
        {"balance__scope": "micro", "balance__coef": 0.0, "dispatch__capacity_factor": 2.0},
        {"balance__scope": "micro", "balance__coef": 0.0, "dispatch__capacity_factor": 2.0, "data__micro_batch": 1},
        ["data.micro_batch was 2, is 1"],
    ),
    (
        {"router__num_groups": 3, "router__groups_kept": 3},
        {"router__num_groups": 3, "router__groups_kept": 2},
        ["router.groups_kept was 3, is 2"],
    ),
    (
        {"router__num_groups": 3, "router__groups_kept": 2},
        {"router__num_groups": 3, "router__groups_kept": 2, "router__group_rule": "max"},
        ["router.group_rule was 'top2_sum', is 'max'"],
    ),
]


@pytest.mark.parametrize(("was", "now", "told"), OTHER)
def test_what_learns_otherwise_counts(was: Fields, now: Fields, told: list[str], tmp_path: Path) -> None:
    one, other = (run_of(tmp_path, tmp_path / "run", fields) for fields in (was, now))
    assert config_differences(one, other) == told


def test_what_is_off_looks_at_no_micro_batch(tmp_path: Path) -> None:
    off = run_of(tmp_path, tmp_path / "run", {"balance__scope": "micro", "balance__coef": 0.0})
    assert looks_at_micro_batches(off) == []
    assert looks_at_micro_batches(changed(off, balance__coef=1e-9)) == ["balance.scope"]


def test_an_equal_shared_width_is_of_the_same_model(tmp_path: Path) -> None:
    one = run_of(tmp_path, tmp_path / "run", {"moe__num_shared_experts": 2})
    assert model_differences(one, changed(one, moe__num_shared_experts=0, moe__shared_width=48)) == []
    assert len(model_differences(one, changed(one, moe__num_shared_experts=0, moe__shared_width=24))) == 2


@pytest.mark.dist
def test_another_run_starts_from_the_same_model_in_other_words(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is told but what is learnt otherwise; how weights would have been drawn is not."""
    first = run_of(corpus, tmp_path / "a", {"moe__num_shared_experts": 1})
    train(first)
    words = changed(first, moe__num_shared_experts=0, moe__shared_width=24, model__init_std=0.5, train__steps=4)
    second = replace(words, run_dir=tmp_path / "b", start=StartConfig(checkpoint=Path(f"{first.run_dir}@2")))
    assert find_source(second) is not None
    capsys.readouterr()
    assert train(second)["started_from"]["differences"] == ["train.steps was 3, is 4"]


DOMAINS = {"a": 1.0, "b": 1.0}
WEIGHTS: list[tuple[dict[str, float], dict[str, float], bool]] = [
    (DOMAINS, {"b": 2.0, "a": 2.0}, True),
    ({"a": 1.0, "b": 2.0}, {"a": 1 / 3, "b": 2 / 3}, True),
    ({"a": 1.0}, {"a": 5.0}, True),
    ({"a": 1.0}, {"a": 1.0, "b": 0.0}, True),
    ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0 + 1e-9}, True),  # less than a row of a period
    (DOMAINS, {"a": 1.0, "b": 1.0 + 8 / PERIOD}, False),
    (DOMAINS, {"a": 1.0, "b": 2.0}, False),
    ({"a": 1.0}, {"b": 1.0}, False),
    ({"a": 1.0}, DOMAINS, False),
]


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, chance = tmp_path_factory.mktemp("domains"), random.Random(3)
    for name in "ab":
        (folder / name).mkdir()
        for idx in range(12):
            (folder / name / f"{idx}.txt").write_text(" ".join(chance.choices(["one", "two", "three", name], k=60)))
    sources = [Source(name=name, path=folder / name) for name in "ab"]
    prepare(sources, folder / "corpus", validation_fraction=0.3)
    return folder / "corpus"


@pytest.mark.parametrize(("was", "now", "is_same"), WEIGHTS)
def test_weights_of_domains_are_on_any_scale(
    was: dict[str, float], now: dict[str, float], is_same: bool, two_domains: Path, tmp_path: Path
) -> None:
    """They are compared by the rows that they give, each of which is the same, in training and validation."""
    one, other = (run_of(two_domains, tmp_path / "run", {"data__domain_weights": weights}) for weights in (was, now))
    assert (config_differences(one, other) == []) is is_same

    def rows(split: Any, weights: dict[str, float]) -> list[tuple[str, int]]:
        dataset = PackedDataset(two_domains, split, 32, 1234, weights)
        return [dataset.locate(row) for row in range(dataset.num_rows or 2 * PERIOD)]

    equal = [rows(split, was) == rows(split, now) for split in ("train", "validation")]
    assert all(equal) is is_same


@pytest.mark.dist
def test_a_run_goes_on_with_the_same_weights_on_another_scale(two_domains: Path, tmp_path: Path) -> None:
    fields = {"data__domain_weights": {"a": 1.0, "b": 3.0}, "optim__min_lr_ratio": 1.0}
    whole = run_of(two_domains, tmp_path / "whole", fields)
    part = changed(replace(whole, run_dir=tmp_path / "part"), train__steps=2)
    for run in (whole, part):
        train(run)
    with pytest.raises(ValueError, match=r"data.domain_weights.a was 1.0, is 2.0"):
        train(changed(part, train__steps=3, data__domain_weights={"a": 2.0, "b": 3.0}))
    train(changed(part, train__steps=3, data__domain_weights={"a": 2.0, "b": 6.0}))
    assert losses(part.run_dir) == losses(whole.run_dir)
