import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
from train.tiny_run import make_run, used_folder, with_mesh

from moetrain.config import OptimConfig
from moetrain.config.load import load_run
from moetrain.train.metrics import MetricsLog
from moetrain.train.run_folder import RunFolder


def test_configuration_is_written_and_the_same_run_may_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    folder = RunFolder(run.run_dir)
    folder.check(run)
    assert not run.run_dir.exists()
    folder.open(run)
    assert load_run(["--config", str(folder.config)]) == run
    folder.check(run)
    folder.check(with_mesh(run, ep=2))
    folder.check(replace(run, train=replace(run.train, log_every=7)))


def test_another_configuration_is_refused_by_field_unless_overwriting(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    folder = RunFolder(run.run_dir)
    used_folder(run)
    other = replace(run, optim=OptimConfig(lr=0.5, warmup_steps=2))
    with pytest.raises(
        ValueError, match=r"another configuration \(optim.lr was 0.003, is 0.5\); choose another --run-dir"
    ):
        folder.check(other)
    overwriting = replace(other, train=replace(other.train, overwrite=True))
    folder.check(overwriting)
    folder.open(overwriting)
    assert load_run(["--config", str(folder.config)]).train.overwrite is False
    assert list(folder.checkpoints.iterdir()) == []
    assert not folder.metrics.exists()
    folder.check(other)


def test_a_run_that_failed_before_its_first_step_leaves_the_folder_free(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    folder = RunFolder(run.run_dir)
    folder.open(run)
    MetricsLog(folder.metrics).truncate(0)
    other = replace(run, seed=9)
    folder.check(other)
    folder.open(other)
    assert load_run(["--config", str(folder.config)]).seed == 9
    MetricsLog(folder.metrics).append({"step": 1, "loss": 1.0, "num_loss_tokens": 180})
    with pytest.raises(ValueError, match="seed was 9, is 1234"):
        folder.check(run)


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    with folder.locked():
        with pytest.raises(ValueError, match="is in use by another run; wait for it"), folder.locked():
            pytest.fail("two runs share a folder")
        with pytest.raises(ValueError, match="is in use by another run"), folder.locked():
            pytest.fail("the refusal freed the folder")
    with folder.locked():
        pass


@pytest.mark.parametrize("number", sorted({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}))
def test_a_file_system_without_locks_is_warned_of_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with RunFolder(tmp_path / "run").locked():
        assert (tmp_path / "run").is_dir()
    assert f"run_dir {tmp_path / 'run'} is on a file system that cannot lock ({os.strerror(number)})" in caplog.text


def test_another_error_of_locking_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), RunFolder(tmp_path / "run").locked():
        pytest.fail("the folder may be in use")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match=r"cannot be made or written to in .*file; choose another --run-dir"):
        folder.check(make_run(tmp_path, folder.path))
    with pytest.raises(ValueError, match="must be a folder that can be written to"), folder.locked():
        pytest.fail("it cannot exist")


def test_a_run_is_finished_when_its_summary_has_all_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    folder = RunFolder(run.run_dir)
    assert folder.finished(run) is None
    folder.open(run)
    assert folder.finished(run) is None
    folder.write_summary({"steps": run.train.steps - 1})
    assert folder.finished(run) is None
    folder.write_summary({"steps": run.train.steps})
    assert folder.finished(run) == {"steps": run.train.steps}
    assert folder.finished(replace(run, train=replace(run.train, overwrite=True))) is None
    assert folder.finished(replace(run, train=replace(run.train, final_eval_rows=3))) is None  # to be validated anew
    folder.summary.write_text("{")
    assert folder.finished(run) is None


def test_starting_anew_in_a_used_folder_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "corpus", tmp_path / "run")
    folder = RunFolder(run.run_dir)
    used_folder(run)
    anew = replace(run, checkpoint=replace(run.checkpoint, resume=False))
    with pytest.raises(ValueError, match=r"holds this run already, and checkpoint.resume is false"):
        folder.check(anew)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run_dir must be a folder"):
        RunFolder(tmp_path / "run").check(make_run(tmp_path, tmp_path / "run"))
