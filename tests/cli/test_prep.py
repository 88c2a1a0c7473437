import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.cli.prep import main
from moetrain.data.indexed import IndexedWriter
from moetrain.data.manifest import Manifest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"text {i} " * 30)
        (folder / f"{i}.md").write_text(f"# heading {i}\n" * 20)
    return folder


def test_sources_become_domains(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    request = ["--source", f"plain={text}:*.txt", "--source", f"marked={text}:*.md", "--out", str(out)]
    assert main([*request, "--validation", "0.25"]) == 0
    manifest = Manifest.read(out)
    assert {name: d.train.documents + d.validation.documents for name, d in manifest.domains.items()} == {
        "plain": 20,
        "marked": 20,
    }
    printed = capsys.readouterr().out
    assert "2 domains" in printed
    assert f"{manifest.entropies.bigram:.3f} after one byte" in printed
    assert main([*request, "--validation", "0.25"]) == 0
    assert "is up to date" in capsys.readouterr().out
    assert main(request) == 2
    assert "other sources or options" in capsys.readouterr().err
    assert main([*request, "--overwrite"]) == 0
    assert Manifest.read(out).options["validation_fraction"] == 0.05


def test_a_dataset_without_validation_text_says_so(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--source", f"one={text / '0.txt'}", "--out", str(tmp_path / "out")]) == 0
    assert "no validation text: a domain needs at least two files" in capsys.readouterr().out


def test_verify_finds_one_flipped_bit(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--source", f"a={text}", "--out", str(out)]) == 0
    assert main(["--verify", "--out", str(out)]) == 0
    assert "every file is as it was written" in capsys.readouterr().out
    raw = bytearray((out / "a.train.bin").read_bytes())
    raw[100] ^= 4
    (out / "a.train.bin").write_bytes(raw)
    assert main(["--verify", "--out", str(out)]) == 2
    assert "a.train.bin is damaged" in capsys.readouterr().err


def test_quickstart_is_capped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quick"
    assert main(["--quickstart", "--max-mb", "0.3", "--out", str(out)]) == 0
    manifest = Manifest.read(out)
    assert "python" in manifest.domains
    for domain in manifest.domains.values():
        assert 0 < domain.train.bytes + domain.validation.bytes < 3e6
    assert manifest.domains["python"].train.bytes + manifest.domains["python"].validation.bytes > 3e5
    assert manifest.entropies.unigram > manifest.entropies.bigram > manifest.entropies.trigram > 0
    assert main(["--quickstart", "--max-mb", "0.3", "--out", str(out)]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --quickstart or at least one --source"),
        (["--quickstart", "--source", "a=b"], "not both"),
        (["--source", "ab"], "--source must be name=path"),
        (["--source", "a=/nowhere"], "/nowhere is neither a folder nor a file"),
        (["--quickstart", "--max-mb", "0"], "--max-mb must be between 0 and 1e9, got 0"),
        (["--quickstart", "--max-mb", "inf"], "--max-mb must be between 0 and 1e9, got inf"),
        (["--quickstart", "--validation", "nan"], "validation_fraction must be between 0.0 and 1.0, got nan"),
        (["--verify"], "no prepared dataset at"),
        (["--verify", "--quickstart"], "--verify only checks --out"),
    ],
)
def test_requests_that_cannot_be_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_configuration_can_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quickstart", "--out", f"{tmp_path}/a\udcffb"]) == 2
    assert r"--out must be text in UTF-8 without NUL, got '" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "was interrupted"), (signal.SIGTERM, 143, "was ended by SIGTERM")]
)
def test_interrupting_is_one_sentence_and_leaves_nothing(
    number: signal.Signals, code: int, said: str, tmp_path: Path, text: Path
) -> None:
    """A real signal to a real process, in the middle of writing."""
    program = (
        # As a terminal starts it: what was started in the background inherits that interrupts are ignored.
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moetrain.data import prep; from moetrain.cli.main import main\n"
        "write = prep._write_domain\n"
        "def slow(*arguments):\n"
        "    print('writing', flush=True); time.sleep(60); return write(*arguments)\n"
        "prep._write_domain = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "prep", "--source", f"a={text}", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "writing\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (code, f"moetrain: prep {said}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_disk_that_is_full_is_one_sentence(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: IndexedWriter, token_id_T: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexedWriter, "add_document", fail)
    assert main(["--source", f"a={text}", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"moetrain prep: {tmp_path / 'out'} could not be prepared: No space left on device; mend that, or name another "
        "--out\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_place_that_cannot_be_written_is_told_by_its_name(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", f"words={text}", "--out", "/proc/x"]) == 1
    assert capsys.readouterr().err == (
        "moetrain prep: /proc/x could not be prepared: No such file or directory; mend that, or name another --out\n"
    )


def test_unknown_options_suggest_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quikstart", "--out", str(tmp_path / "out")])
    assert "--quickstart" in capsys.readouterr().err
