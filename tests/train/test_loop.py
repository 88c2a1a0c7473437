"""Whole runs under torchrun: killed and resumed, repeated, damaged, misused."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import Launched
from layer_configs import layer_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from train.tiny_run import children, losses, make_run, of_steps, run_train, start_ranks, start_train, wait_for

from moetrain.checkpoint import list_checkpoints
from moetrain.checkpoint.folder import find_latest
from moetrain.cli.main import main
from moetrain.config import DataConfig, DispatchConfig, MeshConfig, OptimConfig, RunConfig, SequenceConfig
from moetrain.config.load import to_toml
from moetrain.data.dataset import PackedDataset
from moetrain.data.manifest import Manifest
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.train.loop import train

STEPS = 12


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two ranks that was left alone."""
    folder = tmp_path_factory.mktemp("finished")
    run = make_run(corpus, folder / "run", steps=STEPS, mesh=MeshConfig(ep=2))
    code, out, err = run_train(run, folder, 2)
    assert code == 0, err
    assert f"run folder: {run.run_dir}" in out
    return run


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    path = find_latest(run_dir / "checkpoints")
    assert path is not None
    return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.dist
@pytest.mark.parametrize("restarts", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_no_attempt_overwrites_the_one_before_it(
    restarts: tuple[int, ...], finished: RunConfig, tmp_path: Path
) -> None:
    """Even where torchrun counts a restart on one machine alone, be it the first rank's or not."""
    run = replace(finished, run_dir=tmp_path / "run", train=replace(finished.train, overwrite=True))
    shutil.copytree(finished.run_dir, run.run_dir)
    code, out, err = start_ranks(run, tmp_path, len(restarts), restarts).wait()
    assert code == 0, err
    assert ("resumed from" in out) is any(restarts), out + err
    assert list(losses(run.run_dir)) == list(range(1, STEPS + 1))


def wait_for_step(process: subprocess.Popen[str] | Launched, run: RunConfig, step: int) -> None:
    """Return once ``step`` is in the metrics."""
    metrics = run.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.01)
    assert process.poll() is None, f"the run ended before step {step} could be seen"


def kill_after(run: RunConfig, folder: Path, step: int, of: int = STEPS) -> None:
    """Start the run and SIGKILL all of its processes once ``step`` is in the metrics."""
    ranks = start_ranks(run, folder, 2)
    wait_for_step(ranks, run, step)
    ranks.kill()
    assert max(losses(run.run_dir)) < of


def check_same(run: RunConfig, finished: RunConfig) -> None:
    assert losses(run.run_dir) == losses(finished.run_dir)
    left, right = weights(run.run_dir), weights(finished.run_dir)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.dist
def test_summary_and_metrics_say_what_happened(finished: RunConfig) -> None:
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    by_step = losses(finished.run_dir)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    assert summary["train_loss"] == pytest.approx(sum(by_step.values()) / STEPS)
    assert by_step[1] == pytest.approx(math.log(259), abs=0.3)
    assert by_step[STEPS] < by_step[1] - 0.5
    entropies = Manifest.read(finished.data.path).entropies
    for name in ("unigram", "bigram", "trigram"):
        assert summary[f"{name}_entropy"] == getattr(entropies, name)
    expected: dict[str, object] = {"world_size": 2, "tp": 1, "ep": 2, "edp": 1, "etp": 1, "steps": STEPS}
    expected |= {"skipped_steps": 0, "rows_added": 0, "rows_dropped": 0, "device": "cpu"}
    assert {key: summary[key] for key in expected} == expected
    assert summary["seconds"] > summary["train_seconds"] > 0
    assert summary["tokens_per_second"] == pytest.approx(STEPS * 6 * 32 / summary["train_seconds"])
    records = [json.loads(line) for line in (finished.run_dir / "metrics.jsonl").read_text().splitlines()]
    validations = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    assert sorted(validations) == [4, 8, 12]
    assert summary["validation_loss"] == validations[12]
    whole = PackedDataset(finished.data.path, "validation", finished.data.seq_len).num_rows
    assert whole is not None
    assert whole > 5  # else the last evaluation could not be told from the others
    rows = [record["validation_rows"] for record in records if "validation_rows" in record]
    assert rows == [5, 5, whole]
    assert [path.name for path in list_checkpoints(finished.run_dir / "checkpoints")] == [
        "step-00000010",
        "step-00000012",
    ]


@pytest.mark.dist
def test_validation_does_not_depend_on_the_ranks(finished: RunConfig, tmp_path: Path) -> None:
    """One rank takes the same run up at its end, and evaluates again; then nothing is left to train."""
    alone = tmp_path / "run"
    shutil.copytree(finished.run_dir, alone)
    run = replace(finished, run_dir=alone, mesh=MeshConfig())
    before = json.loads((alone / "summary.json").read_text())
    (alone / "summary.json").unlink()  # as if the run had been killed just before its end
    code, out, err = start_ranks(run, tmp_path, 1).wait()
    assert code == 0, err
    assert f"after step {STEPS}" in out
    after = json.loads((alone / "summary.json").read_text())
    assert after["world_size"] == 1
    assert after["validation_loss"] == pytest.approx(before["validation_loss"], rel=1e-6)
    assert after["train_loss"] == before["train_loss"]


@pytest.mark.dist
def test_killed_once_and_resumed_is_bit_identical(corpus: Path, finished: RunConfig, tmp_path: Path) -> None:
    run = replace(finished, run_dir=tmp_path / "run")
    kill_after(run, tmp_path, 7)
    code, out, err = start_ranks(run, tmp_path, 2).wait()
    assert code == 0, err
    assert "resumed from" in out
    check_same(run, finished)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_killed_three_times_and_resumed_is_bit_identical(finished: RunConfig, tmp_path: Path) -> None:
    run = replace(finished, run_dir=tmp_path / "run")
    for step in sorted(random.Random(3).sample(range(1, STEPS - 3), 3)):
        kill_after(run, tmp_path, step)
    assert start_ranks(run, tmp_path, 2).wait()[0] == 0
    check_same(run, finished)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_documents_killed_twenty_times_are_bit_identical(corpus: Path, tmp_path: Path) -> None:
    """Gangs beside experts, plans by measured costs and pieces made ahead, activations on the host."""
    documents = DataConfig(path=corpus, packing="documents", context=60, batch_tokens=800)
    sequence = SequenceConfig(planner="moetrain", capacity=40, offload=0.5, costs="measured")
    whole = make_run(corpus, tmp_path / "whole", steps=44, mesh=MeshConfig(ep=2), data=documents, sequence=sequence)
    assert start_ranks(whole, tmp_path, 2).wait()[0] == 0
    measured = replace(sequence, costs=str(whole.run_dir / "profile.json"))
    run = replace(whole, run_dir=tmp_path / "run", sequence=measured)
    for step in range(1, 41, 2):
        kill_after(run, tmp_path, step, of=44)
    assert start_ranks(run, tmp_path, 2).wait()[0] == 0
    check_same(run, whole)


@pytest.mark.dist
def test_a_folded_run_goes_on_under_other_foldings(corpus: Path, tmp_path: Path) -> None:
    """Four ranks fold dp = 2 x tp = 2 with ep = 2 x etp = 2; from their checkpoint two ranks, and one, do the rest."""
    folded = make_run(corpus, tmp_path / "run", steps=4, mesh=MeshConfig(tp=2, ep=2, etp=2))
    code, out, err = start_ranks(folded, tmp_path, 4).wait()
    assert code == 0, err
    assert "on 4 cpu rank(s): dp=2, tp=2, edp=1, ep=2, etp=2" in out
    expected = losses(folded.run_dir)
    for ranks, mesh in ((2, MeshConfig(ep=2)), (1, MeshConfig())):
        run = replace(folded, run_dir=tmp_path / f"run-{ranks}", mesh=mesh)
        shutil.copytree(folded.run_dir, run.run_dir)
        shutil.rmtree(list_checkpoints(run.run_dir / "checkpoints")[-1])
        (run.run_dir / "summary.json").unlink()
        if ranks == 1:
            train(run)
        else:
            code, out, err = start_ranks(run, tmp_path, ranks).wait()
            assert code == 0, err
            assert "after step 2" in out
        assert losses(run.run_dir) == pytest.approx(expected, rel=1e-5)
        first, anew = of_steps(folded.run_dir, "seconds"), of_steps(run.run_dir, "seconds")
        assert [step for step in first if first[step] != anew[step]] == [3, 4]


@pytest.mark.dist
def test_a_damaged_newest_checkpoint_costs_one_interval(finished: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    run = replace(finished, run_dir=tmp_path / "run")
    newest = list_checkpoints(run.run_dir / "checkpoints")[-1] / "data-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(bytes(data))
    code, out, err = start_ranks(run, tmp_path, 2).wait()
    assert code == 0, err
    assert "step-00000012 is damaged: data-00001.safetensors does not match its checksum" in err
    assert "after step 10" in out
    check_same(run, finished)


@pytest.mark.dist
def test_a_run_without_a_whole_checkpoint_is_left_as_it_is(finished: RunConfig, tmp_path: Path) -> None:
    """To start anew would empty the metrics of all steps, though a checkpoint may be restored from elsewhere."""
    shutil.copytree(finished.run_dir, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    run = replace(finished, run_dir=tmp_path / "run")
    paths = list_checkpoints(run.run_dir / "checkpoints")
    for path in paths:
        (path / "metadata.json").unlink()
    code, _, err = start_ranks(run, tmp_path, 2).wait()
    assert code != 0
    said = [line for line in err.splitlines() if "can only go on from a checkpoint that is whole" in line]
    assert len(said) == 1
    assert all(path.name in said[0] for path in paths)
    assert "moetrain/train/" not in err  # no traceback of ours
    assert losses(run.run_dir) == losses(finished.run_dir)


@pytest.mark.dist
def test_one_process_needs_no_torchrun_and_trains_the_same(finished: RunConfig, tmp_path: Path) -> None:
    run = replace(finished, run_dir=tmp_path / "run", mesh=MeshConfig())
    summary = train(run)
    assert not torch.distributed.is_initialized()
    alone, together = losses(run.run_dir), losses(finished.run_dir)
    assert alone.keys() == together.keys()
    assert [alone[step] for step in alone] == pytest.approx([together[step] for step in alone], rel=1e-4)
    assert (summary["world_size"], summary["steps"]) == (1, STEPS)
    assert train(run)["train_loss"] == summary["train_loss"]  # nothing was left to do
    with pytest.raises(ValueError, match=r"model.vocab_size \(200\) must be at least 259"):
        train(replace(run, model=replace(run.model, vocab_size=200), run_dir=tmp_path / "other"))


@pytest.mark.dist
def test_a_run_goes_on_with_other_settings_of_memory_and_overlap(corpus: Path, tmp_path: Path) -> None:
    """As on fewer or smaller GPUs: smaller micro-batches, and what is cheap to compute again is not kept."""
    run = make_run(corpus, tmp_path / "run", steps=4)
    train(run)
    expected = losses(run.run_dir)
    shutil.rmtree(list_checkpoints(run.run_dir / "checkpoints")[-1])
    other = replace(
        run,
        data=replace(run.data, micro_batch=1),
        moe=replace(run.moe, recompute_hidden=True),
        dispatch=DispatchConfig(pieces=2),
        train=replace(run.train, activation_checkpoint=True, reshard_after_forward=False),
    )
    train(other)
    assert losses(run.run_dir) == pytest.approx(expected, rel=1e-5)
    assert losses(run.run_dir) != expected  # other sums in another order: steps 3 and 4 were done anew
    assert [losses(run.run_dir)[step] for step in (1, 2)] == [expected[step] for step in (1, 2)]


@pytest.mark.dist
@pytest.mark.parametrize(("rule", "grows"), [("up", "rows_added"), ("down", "rows_dropped")])
def test_rounded_rows_are_reported_under_their_own_names(corpus: Path, tmp_path: Path, rule: str, grows: str) -> None:
    """A rule that only adds drops nothing, and the other way round: counters that changed places would show."""
    layer = layer_config(num_experts=6, top_k=2, expert_width=24, rounding=rule, tile=8)
    run = make_run(corpus, tmp_path / "run", steps=2, layer=layer)
    train(run)
    records = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    summary = json.loads((run.run_dir / "summary.json").read_text())
    still = {"rows_added": "rows_dropped", "rows_dropped": "rows_added"}[grows]
    assert [record[still] for record in steps] == [0, 0]
    assert all(record[grows] > 0 for record in steps)
    assert (summary[still], summary[grows]) == (0, sum(record[grows] for record in steps))


@pytest.mark.dist
def test_without_validation_text_there_is_no_validation_loss(finished: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("one file alone validates nothing " * 40)
    prepare([Source(name="only", path=tmp_path / "only.txt")], tmp_path / "corpus")
    data = replace(finished.data, path=tmp_path / "corpus")
    settings = replace(finished.train, steps=2)
    run = replace(finished, run_dir=tmp_path / "run", mesh=MeshConfig(), data=data, train=settings)
    assert train(run)["validation_loss"] is None
    assert "validation_loss" not in (run.run_dir / "metrics.jsonl").read_text()


@pytest.mark.dist
def test_the_loss_is_compared_with_the_domains_that_validate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``--data.domain-weights`` the validation set is of fewer domains than the manifest's entropies."""
    for name, words in (("few", "a b c"), ("many", "the quick brown fox jumps over it")):
        (tmp_path / name).mkdir()
        for idx in range(8):
            text = " ".join(random.Random(idx).choices(words.split(), k=90))
            (tmp_path / name / f"{idx}.txt").write_text(text)
    sources = [Source(name=name, path=tmp_path / name) for name in ("few", "many")]
    manifest = prepare(sources, tmp_path / "corpus", validation_fraction=0.3)
    run = make_run(tmp_path / "corpus", tmp_path / "run", steps=2, final_eval_rows=3)
    summary = train(replace(run, data=replace(run.data, domain_weights={"few": 1.0})))
    right = manifest.domains["few"].entropies
    assert right.unigram < manifest.entropies.unigram - 0.3  # else the wrong ones would pass
    found = (summary["unigram_entropy"], summary["bigram_entropy"], summary["trigram_entropy"])
    assert found == (right.unigram, right.bigram, right.trigram)
    num_rows = PackedDataset(run.data.path, "validation", 32, domain_weights={"few": 1.0}).num_rows
    assert (summary["validation_rows"], summary["validation_rows_in_all"]) == (3, num_rows)
    assert f"the unigram entropy of the whole validation text, {right.unigram:.4f}" in capsys.readouterr().out


@pytest.mark.dist
def test_a_used_folder_refuses_another_run_in_one_sentence(finished: RunConfig, tmp_path: Path) -> None:
    run = replace(finished, optim=OptimConfig(lr=0.5, warmup_steps=2), mesh=MeshConfig())
    code, _, err = start_ranks(run, tmp_path, 1).wait()
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("moetrain: ")]
    assert len(said) == 1
    assert "optim.lr was 0.003, is 0.5" in said[0]
    assert "moetrain/train/" not in err  # no traceback of ours


@pytest.mark.dist
def test_a_failing_rank_ends_the_run_in_one_sentence(corpus: Path, finished: RunConfig, tmp_path: Path) -> None:
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    tokens = np.memmap(broken / "words.train.bin", dtype=np.uint16, mode="r+")
    tokens[200::400] = 60000
    tokens.flush()
    run = replace(finished, run_dir=tmp_path / "run", data=replace(finished.data, path=broken))
    code, _, err = run_train(run, tmp_path, 2)
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("moetrain: rank ")]
    assert any("60000" in line for line in said), err
    assert "moetrain/train/" not in err  # no traceback of ours
    assert not (run.run_dir / "summary.json").exists()


@pytest.mark.dist
def test_a_full_disk_ends_the_run_in_one_sentence(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(corpus, tmp_path / "run", steps=4)
    (tmp_path / "run.toml").write_text(to_toml(run))
    writes = iter([save_file])  # the first checkpoint fits, the second does not

    def until_full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        write = next(writes, None)
        if write is None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        write(tensors, path)

    monkeypatch.setattr("moetrain.checkpoint.storage.save_file", until_full)
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 1
    err = capfd.readouterr().err
    assert "step-00000004 could not be saved: rank 0: " in err
    assert "free space" in err
    assert "Traceback" not in err
    assert find_latest(run.run_dir / "checkpoints") == run.run_dir / "checkpoints" / "step-00000002"


@pytest.mark.dist
def test_ranks_that_hang_are_ended_and_say_where_they_stood(corpus: Path, tmp_path: Path) -> None:
    """This suite's own watch over torchrun: one rank is stopped, the other waits for it; each tells its stack whole."""
    run = make_run(corpus, tmp_path / "run", steps=100_000, mesh=MeshConfig(ep=2))
    process = start_train(run, tmp_path, 2)
    wait_for_step(process, run, 1)
    ranks = children(process.pid)
    os.kill(ranks[0], signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"the ranks did not end in 2 s") as caught:
        wait_for(process, timeout_s=2)
    assert str(caught.value).count("Fatal Python error: Aborted") == 2
    assert str(caught.value).count(" in _step\n") >= 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*ranks, process.pid))


@pytest.mark.dist
def test_forked_ranks_that_hang_are_ended_and_say_where_they_stood(corpus: Path, tmp_path: Path) -> None:
    """The same watch over ranks without torchrun."""
    run = make_run(corpus, tmp_path / "run", steps=100_000, mesh=MeshConfig(ep=2))
    ranks = start_ranks(run, tmp_path, 2)
    wait_for_step(ranks, run, 1)
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"the ranks did not end in 1 s") as caught:
        ranks.wait(timeout_s=1)
    assert str(caught.value).count("Fatal Python error: Aborted") == 2
    assert [process.exitcode for process in ranks.processes] == [-signal.SIGABRT] * 2
