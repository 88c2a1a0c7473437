"""``metrics.jsonl`` loses nothing but steps that are done again and what a crash has left."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train.tiny_run import make_run, used_folder

from moetrain.train.metrics import MetricsLog
from moetrain.train.own_files import strangers
from moetrain.train.run_folder import RunFolder


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 3, "num_loss_tokens": 180}


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        log.append(record(step))
    log.append({"step": 4, "validation_loss": 2.5})
    log.truncate(3)
    assert log.records() == [record(step) for step in (1, 2, 3)]
    log.append({**record(4), "loss": 9.0})
    assert [record["step"] for record in log.records()] == [1, 2, 3, 4]
    log.truncate(0)
    assert log.records() == []


def test_what_stays_is_as_it_was_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"num_loss_tokens":180,"step":1,"loss":2.50}\n' + json.dumps(record(2))
    path.write_text(text)
    MetricsLog(path).truncate(2)
    assert path.read_text() == text + "\n"


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b'{"st', b"\0\0\0\n", b"\n"])
def test_what_a_crash_has_left_is_dropped_and_told(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(record(1)).encode() + b"\n" + damage)
    log = MetricsLog(path)
    assert strangers(tmp_path) == []
    log.truncate(5)
    assert ("1 line(s) that a crash had damaged were removed" in caplog.text) is (damage != b"\n")
    log.append(record(2))
    assert log.records() == [record(1), record(2)]


LOST = [b"", b"\0\0", b"\0" * 20 + b'"step": 2}']
STRANGE = [b"garbage", b"5", b'{"a": 1}', b'{"step": "two", "num_loss_tokens": 1}', b"\xff\xfe", b'{"step": 2, "lo']


@pytest.mark.parametrize("damaged", [*LOST, *STRANGE])
def test_a_damaged_line_costs_no_other_record(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(record(step)).encode() for step in (1, 2, 3)]
    path.write_bytes(b"\n".join([whole[0], damaged, *whole[1:]]) + b"\n")
    log = MetricsLog(path)
    assert log.records() == [record(1), record(2), record(3)]
    if damaged in LOST:
        log.truncate(2)
        assert path.read_bytes() == b"\n".join(whole[:2]) + b"\n"


MINE = [
    *(line + b"\n" for line in STRANGE),
    b"# the good one\n",
    b"no newline",
    b'{"step": 2, "num_loss_tokens": 180} # good',
    b'{"step": 2, "accuracy": 0.9}\n',
]


@pytest.mark.parametrize("line", MINE)
def test_a_line_that_no_run_has_written_is_refused_and_stays(line: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path, tmp_path / "run")
    used_folder(run)
    folder = RunFolder(run.run_dir)
    with folder.metrics.open("ab") as file:
        file.write(line)
    before = folder.metrics.read_bytes()
    for wanted in (run, replace(run, train=replace(run.train, overwrite=True))):
        with pytest.raises(ValueError, match=r"holds metrics.jsonl that .* \(line 2 of metrics.jsonl is no record\)"):
            folder.check(wanted)
    with pytest.raises(ValueError, match=r"its line 2 is something else; move that line, or rename the file"):
        MetricsLog(folder.metrics).truncate(0)
    assert folder.metrics.read_bytes() == before
