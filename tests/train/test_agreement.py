"""Ranks that differ in configuration, data or type of compute are refused, all of them, before the folder changes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import Launched
from ranks import run_on_ranks
from train.tiny_run import make_run, used_folder

from moetrain.config import RunConfig
from moetrain.config.load import to_toml
from moetrain.data.manifest import Manifest, data_facts
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.train import loop
from moetrain.train.agreement import Statement, disagreement, require_agreement
from moetrain.train.run_folder import RunFolder
from moetrain.train.world import RefusedByAllError

F32, BF16 = torch.float32, torch.bfloat16


def prepared(folder: Path, text: str) -> Manifest:
    (folder / "text").mkdir(parents=True)
    for idx in range(4):
        (folder / "text" / f"{idx}.txt").write_text(f"{text} {idx} " * 40)
    prepare([Source(name="words", path=folder / "text")], folder / "corpus", validation_fraction=0.5)
    return Manifest.read(folder / "corpus")


def test_what_a_machine_has_for_itself_may_differ(corpus: Path, tmp_path: Path) -> None:
    run, manifest = make_run(corpus, tmp_path / "run"), Manifest.read(corpus)
    elsewhere = replace(
        run,
        data=replace(run.data, path=tmp_path / "elsewhere"),
        train=replace(run.train, threads=7),
        run_dir=tmp_path / "mounted" / "run",
    )
    assert Statement.of(elsewhere, manifest, F32).digest() == Statement.of(run, manifest, F32).digest()
    other_host = replace(Statement.of(run, manifest, F32), machine="other")
    assert other_host.digest() == Statement.of(run, manifest, F32).digest()


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("optim", {"lr": 0.5}),
    ("dispatch", {"capacity_factor": 1.25}),
    ("mesh", {"ranks_per_node": 4}),
    ("data", {"domain_weights": {"words": 2.0}}),
    ("checkpoint", {"every": 3}),
    ("train", {"timeout_s": 5.0}),
]


@pytest.mark.parametrize(("part", "values"), CHANGES)
def test_every_other_field_counts(part: str, values: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    run, manifest = make_run(corpus, tmp_path / "run"), Manifest.read(corpus)
    other = replace(run, **{part: replace(getattr(run, part), **values)})
    assert Statement.of(other, manifest, F32).digest() != Statement.of(run, manifest, F32).digest()
    assert Statement.of(run, manifest, BF16).digest() != Statement.of(run, manifest, F32).digest()


def test_datasets_are_equal_by_content_not_by_time_or_place(tmp_path: Path) -> None:
    first, copy, other = (prepared(tmp_path / name, text) for name, text in (("a", "one"), ("b", "one"), ("c", "two")))
    assert first.fingerprint != copy.fingerprint  # it has paths and times in it
    assert data_facts(first) == data_facts(copy)
    assert data_facts(first) != data_facts(other)
    assert data_facts(first) != data_facts(replace(first, tokenizer="other"))
    assert data_facts(first) != data_facts(replace(first, vocab_size=300))


FIRST = Statement("a", {"optim.lr": 0.1, "train.dtype": "auto"}, {"tokenizer": "byte", "file w.bin": "00"}, "bfloat16")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            replace(FIRST, config={**FIRST.config, "optim.lr": 0.2, "dispatch.capacity_factor": 1.5}),
            "optim.lr is 0.2, against 0.1 on rank 0; dispatch.capacity_factor is 1.5, against None on rank 0; give "
            "every machine the same options and the same --config file",
        ),
        (
            replace(FIRST, data={**FIRST.data, "file w.bin": "01"}),
            "the dataset's file w.bin is '01', against '00' on rank 0; give every machine the same dataset: copy one, "
            "or name one that all share with --data.path",
        ),
        (
            replace(FIRST, dtype="float32"),
            "the type of compute is 'float32', against 'bfloat16' on rank 0; set train.dtype to the type that all "
            "devices are to compute in, instead of 'auto'",
        ),
        (
            replace(FIRST, config={**FIRST.config, "train.dtype": "float32"}, dtype="float32"),
            "train.dtype is 'float32', against 'auto' on rank 0; give every machine the same options and the same "
            "--config file",
        ),
    ],
)
def test_the_refusal_names_fields_values_and_cure(other: Statement, text: str) -> None:
    assert disagreement(FIRST, other) == text


def disagree_body(rank: int, statements: list[Statement]) -> str:
    require_agreement(statements[0])
    with pytest.raises(RefusedByAllError) as caught:
        require_agreement(statements[rank])
    dist.barrier()  # nothing is under way: all ranks come here
    return str(caught.value)


@pytest.mark.dist
def test_all_ranks_refuse_what_some_are_about_to_do() -> None:
    other = replace(FIRST, machine="c", dtype="float32")
    messages = run_on_ranks(4, disagree_body, [FIRST, replace(FIRST, machine="b"), other, other])
    assert len(set(messages)) == 1
    assert messages[0].startswith(
        "all 4 ranks must be about to do the same, but 2 of them differ from rank 0 on a, the first of these being "
        "rank 2 on c: the type of compute is 'float32', against 'bfloat16' on rank 0; set train.dtype"
    )


def say_and_end(runs: list[RunConfig], folder: Path) -> list[str]:
    """What ``moetrain train`` writes to stderr, once per run, as on several machines; all of them must be refused."""
    commands = []
    for rank, run in enumerate(runs):
        config = folder / f"rank-{rank}.toml"
        config.write_text(to_toml(run))
        commands.append(["train", "--config", str(config)])
    ranks = Launched(commands, folder, [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}] * len(runs))
    ranks.wait(timeout_s=120.0)
    assert [process.exitcode for process in ranks.processes] == [2] * len(runs)
    return [ranks.said(rank)[1] for rank in range(len(runs))]


@pytest.mark.dist
def test_machines_with_other_options_or_data_change_nothing(corpus: Path, tmp_path: Path) -> None:
    """One of two machines has an old configuration file and a dataset that was prepared from other text."""
    first = make_run(corpus, tmp_path / "run")
    first = replace(first, mesh=replace(first.mesh, ranks_per_node=1), train=replace(first.train, timeout_s=60.0))
    prepared(tmp_path / "other", "other text")
    second = replace(first, optim=replace(first.optim, lr=0.5))
    second = replace(second, data=replace(second.data, path=tmp_path / "other" / "corpus"))
    for said in say_and_end([first, second], tmp_path):
        assert "the first of these being rank 1 on" in said
        assert "optim.lr is 0.5, against 0.003 on rank 0; the dataset's file words.train.bin is '" in said
        assert sum(line.startswith("moetrain: ") for line in said.splitlines()) == 1
        assert "Traceback" not in said
    assert not (first.run_dir / "config.toml").exists()


def test_a_refused_run_loses_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it may overwrite: ranks agree before the folder is opened. What the user gave is compared."""
    run = make_run(corpus, tmp_path / "run")
    files = used_folder(run)
    stated: list[Statement] = []

    def refuse(statement: Statement) -> None:
        assert dist.is_initialized()
        stated.append(statement)
        raise RefusedByAllError("ranks differ")

    monkeypatch.setattr(loop, "require_agreement", refuse)
    wanted = replace(run, train=replace(run.train, overwrite=True))
    with pytest.raises(RefusedByAllError, match="ranks differ"):
        loop.train(wanted)
    assert stated == [Statement.of(wanted, Manifest.read(corpus), F32)]
    assert {path: path.read_bytes() for path in files} == files
    assert (RunFolder(run.run_dir).checkpoints / "step-00000002").is_dir()


def test_a_copy_of_the_dataset_is_the_same(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    assert data_facts(Manifest.read(tmp_path / "copy")) == data_facts(Manifest.read(corpus))
