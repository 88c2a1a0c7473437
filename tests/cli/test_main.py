import subprocess
import sys
from pathlib import Path

import pytest
from work import run_and_list_packages

import moetrain
from moetrain.cli.main import COMMANDS, NOT_BUILT, main
from moetrain.config import load_run
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.train.metrics import MetricsLog
from moetrain.train.run_folder import RunFolder


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    import os

    done = subprocess.run(
        [sys.executable, "-m", "moetrain", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for name in (*COMMANDS, *NOT_BUILT):
        assert name in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moetrain {moetrain.__version__}\n"


@pytest.mark.parametrize("command", sorted(NOT_BUILT))
def test_what_is_not_built_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--anything"]) == 2
    assert f"`moetrain {command}` is not built yet; " in capsys.readouterr().err


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean `moetrain train`?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "see `moetrain --help`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "packages", "text"),
    [(["--help"], ["moetrain"], "commands:"), (["train", "--help"], ["moetrain", "numpy"], "--optim.lr FLOAT")],
    ids=str,
)
def test_help_imports_little(arguments: list[str], packages: list[str], text: str) -> None:
    code, said, errors, imported = run_and_list_packages(*arguments)
    assert (code, errors, imported) == (0, "", packages)
    assert text in said


def test_training_without_data_is_refused_in_one_sentence(tmp_path: Path) -> None:
    code, out, err = run(
        "train", "--preset", "tiny", "--data.path", str(tmp_path / "none"), "--run-dir", str(tmp_path / "r")
    )
    assert (code, out) == (2, "")
    assert err.startswith(f"moetrain: no prepared dataset at {tmp_path / 'none'}")
    assert err.count("\n") == 1
    assert not (tmp_path / "r").exists()


WRONG = [
    (["--optim.lr", "0"], "optim.lr must be positive"),
    (["--moe.top-k", "99"], "moe.top_k (99) must be at most moe.num_experts (8)"),
    (["--optim.lrr", "1"], "did you mean --optim.lr?"),
    (["--mesh.ep", "2"], "must divide the number of ranks, 1"),
    (["--mesh.pp", "2"], "mesh.pp = 2 is not built yet"),
    (["--preset", "tinny"], "tiny"),
]


@pytest.mark.parametrize(("options", "text"), WRONG)
def test_a_wrong_option_is_refused_before_torch(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("moetrain.cli.train._train", lambda run: pytest.fail("it started"))
    assert main(["train", "--preset", "tiny", *options]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.startswith("moetrain: ")
    assert err.count("\n") == 1


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A tiny run on a corpus of two files."""
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / name).write_text(f"{name} word after word " * 40)
    prepare([Source(name="words", path=tmp_path / "text")], tmp_path / "corpus")
    return [
        "--preset",
        "tiny",
        "--steps",
        "3",
        "--data.path",
        str(tmp_path / "corpus"),
        "--run-dir",
        str(tmp_path / "r"),
    ]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["--model.vocab-size", "200"], "model.vocab_size (200) must be at least 259"),
        (["--data.domain-weights", "word=1"], "did you mean 'words'?"),
        (["--data.domain-weights", "words=1,words=2"], "names 'words' twice"),
        (["--data.path", "/nowhere"], "no prepared dataset at /nowhere"),
        (["--run-dir", "/dev/null"], "run_dir must be a folder, got the file /dev/null"),
        (["--run-dir", ""], "run_dir must name a folder"),
        (["--seed", "9" * 30], "seed must fit 64 bits"),
        (["--train.timeout-s", "1e300"], "train.timeout_s must be above 0 and at most 1,000,000"),
        (
            ["--from", "/nowhere@3"],
            "--from must name a run's folder or a checkpoint's, as RUN or RUN@STEP, but /nowhere is",
        ),
        (["--run-dir", "x" * 300], "run_dir cannot be used: File name too long"),
        (["--data.path", "x" * 300], "data.path cannot be used: File name too long"),
        (["--config", "x" * 300], "config file cannot be used: File name too long"),
        (["--from", "x" * 300], "--from cannot be used: File name too long"),
        (["--check", "0"], "--check must be followed by a number of ranks of at least 1, got '0'"),
        (["--check=two"], "--check must be followed by a number of ranks of at least 1, got 'two'"),
        (["--check="], "--check must be followed by a number of ranks of at least 1, got ''"),
        (["--check"], "--check must be followed by a number of ranks of at least 1, got ''"),
        (["--check=2", "--check", "3"], "--check must be given once, got it twice; keep one of them"),
        (["--fresh=true"], "--fresh takes no value, got 'true'; write --fresh alone"),
        (["--fresh="], "--fresh takes no value, got ''; write --fresh alone"),
        (["--fresh", "true"], "--fresh takes no value, got 'true'; write --fresh alone"),
    ],
)
def test_wrong_data_and_folders_are_refused_before_torch(options: list[str], wrong: list[str], text: str) -> None:
    code = "import sys; from moetrain.cli.main import main; code = main(sys.argv[1:]); "
    code += "sys.exit(99 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code, "train", *options, *wrong], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


def test_check_starts_nothing_and_knows_a_finished_run(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("moetrain.cli.train._train", lambda run: pytest.fail("it started"))
    assert main(["train", *options, "--check", "2"]) == 0
    assert main(["train", *options, "--check=2", "--fresh"]) == 0
    assert main(["train", *options, "--check", "2", "--mesh.ep", "3"]) == 2
    assert not (tmp_path / "r").exists()
    run = load_run(options)
    folder = RunFolder(run.run_dir)
    folder.open(run)
    MetricsLog(folder.metrics).append({"step": 3, "loss": 1.0, "num_loss_tokens": 64})
    entropies = {f"{name}_entropy": 2.0 for name in ("unigram", "bigram", "trigram")}
    by = {"versions": {"moetrain": "0.1.0"}}
    folder.write_summary({"steps": 3, "train_loss": 1.5, "validation_loss": 1.75, **entropies, **by})
    capsys.readouterr()
    for arguments, exit_code in ((["--check", "2"], 3), (["--check=2"], 3), ([], 0)):
        assert main(["train", *options, *arguments]) == exit_code
        out = capsys.readouterr().out
        assert "validation loss 1.7500" in out
        assert "0.2500 below the bigram entropy" in out
        assert f"run folder: {folder.path}" in out
    assert main(["train", *options, "--check", "2", "--steps", "4"]) == 2
    assert "train.steps was 3, is 4" in capsys.readouterr().err


PLACE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(("local_rank", "speaks"), [("1", False), ("0", True)])
def test_the_first_rank_of_each_machine_speaks(
    local_rank: str, speaks: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong may be wrong on a machine without rank 0 alone, as a folder that it lacks."""
    for name, text in {**PLACE, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, text)
    assert main(["train", "--optim.lr", "0"]) == 2
    assert ("optim.lr" in capsys.readouterr().err) == speaks


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"RANK": "5"}, "RANK must be a whole number from 0 to 1, got '5'"),
        ({"WORLD_SIZE": "1"}, "RANK must be a whole number from 0 to 0, got '1'"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE must be a whole number at least 1, got 'x'"),
        ({"RANK": "-1"}, "RANK must be a whole number from 0 to 1, got '-1'"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK must be a whole number from 0 to 1, got '7'"),
        ({"LOCAL_RANK": None}, "each of the 2 ranks must set LOCAL_RANK and LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None}, "but lacks LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({"MASTER_PORT": None}, "but lacks MASTER_PORT"),
        ({"MASTER_PORT": None, "MASTER_ADDR": None, "LOCAL_RANK": None}, "but lacks MASTER_ADDR, MASTER_PORT"),
    ],
)
@pytest.mark.parametrize("fault", [[], ["--data.path", "/nowhere"], ["--fresh"], ["--steps", "x", "--help", "none"]])
def test_a_rank_whose_own_place_is_wrong_says_so(
    fault: list[str],
    wrong: dict[str, str | None],
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever else is wrong, as no other rank can say it for this one."""
    monkeypatch.setattr("moetrain.cli.train._train", lambda run: pytest.fail("it started"))
    for name, value in {**PLACE, **wrong}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert main(["train", *fault]) == 2
    err = capsys.readouterr().err
    assert "--help" in fault or text in err
    assert err.startswith("moetrain: ")
    assert err.count("\n") == 1


def test_a_rank_that_alone_sees_no_gpu_says_so(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    ranks = ["--data.global-batch", "2", "--data.micro-batch", "1"]
    assert main(["train", *options, *ranks, "--train.device", "cuda"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moetrain: rank 1: train.device = 'cuda' needs a GPU for each of the 2 ranks of this machine")
    assert err.count("\n") == 1


def test_a_place_that_is_wrong_can_be_checked_without(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a shell of a launcher's allocation; what is wrong with the run is said there too."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert main(["train", *options, "--check", "2"]) == 0
    assert main(["train", *options, "--check", "2", "--data.path", "/nowhere"]) == 2
    assert "no prepared dataset at /nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["Connection closed by peer [127.0.0.1]", "readv: Connection reset by peer", "writev: Broken pipe"]
)
def test_another_ranks_end_is_told_in_one_sentence(
    text: str, options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: object) -> None:
        raise RuntimeError(f"[gloo/transport/tcp/pair.cc:553] {text}")

    monkeypatch.setattr("moetrain.train.loop.train", fail)
    assert main(["train", *options]) == 1
    assert capsys.readouterr().err == (
        "moetrain: another rank ended, and so does this one; start again to go on from the newest checkpoint\n"
    )


def test_interrupting_training_is_one_sentence(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moetrain.train.loop.train", interrupt)
    assert main(["train", *options]) == 130
    assert capsys.readouterr().err == (
        "moetrain: train was interrupted; start again to go on from the newest checkpoint\n"
    )
