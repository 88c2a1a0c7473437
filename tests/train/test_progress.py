import io

import pytest
from rich.console import Console

from moetrain.train.progress import ProgressDisplay, StepLine, duration
from moetrain.train.run_folder import summary_lines


def line(step: int) -> StepLine:
    return StepLine(step=step, loss=2.34567, lr=3e-3, tokens_per_second=12345.6, max_vio=0.5, seconds_left=125)


def shown(*, terminal: bool = False, silent: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, highlight=False, soft_wrap=True)
    with ProgressDisplay(10, silent=silent, log_every=4, console=console) as display:
        for step in range(1, 11):
            display.step(line(step))
        display.message("[tag] stays as it is")
    return file.getvalue()


def test_plain_lines_every_so_often_and_at_both_ends() -> None:
    lines = shown().splitlines()
    assert [text.split("/")[0] for text in lines[:-1]] == ["step 1", "step 4", "step 8", "step 10"]
    assert lines[0] == "step 1/10  loss 2.3457  lr 3.00e-03  12,346 tokens/s  MaxVio 0.50  2m 05s left"
    assert lines[-1] == "[tag] stays as it is"


def test_a_terminal_gets_a_bar() -> None:
    text = shown(terminal=True)
    assert "10/10" in text
    assert "loss 2.3457" in text
    assert "[tag] stays as it is" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_show_nothing(terminal: bool) -> None:
    assert shown(terminal=terminal, silent=True) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (42.4, "42s"), (60, "1m 00s"), (3599, "59m 59s"), (7805, "2h 10m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_end_says_what_the_loss_is_compared_with() -> None:
    summary = {"validation_loss": 2.0, "train_loss": 1.9, "steps": 7}
    summary |= {"unigram_entropy": 3.5, "bigram_entropy": 2.25, "trigram_entropy": 1.75}
    assert summary_lines(summary) == [
        "validation loss 2.0000 nats per token after 7 steps (train 1.9000)",
        "  1.5000 below the unigram entropy of the validation text, 3.5000",
        "  0.2500 below the bigram entropy of the validation text, 2.2500",
        "  0.2500 above the trigram entropy of the validation text, 1.7500",
    ]


def test_the_end_says_when_only_a_part_was_validated() -> None:
    summary = {"validation_loss": 2.0, "train_loss": 1.9, "steps": 7, "validation_rows": 64}
    summary |= {"unigram_entropy": 3.5, "bigram_entropy": 2.25, "trigram_entropy": 1.75}
    lines = summary_lines(summary | {"validation_rows_in_all": 1200})
    assert lines[0] == "validation loss 2.0000 nats per token after 7 steps, on 64 of 1,200 rows (train 1.9000)"
    assert lines[1] == "  1.5000 below the unigram entropy of the whole validation text, 3.5000"
    assert " rows" not in summary_lines(summary | {"validation_rows_in_all": 64})[0]


def test_without_validation_text_the_end_says_so() -> None:
    (line,) = summary_lines({"validation_loss": None, "train_loss": 1.9, "steps": 7})
    assert line.startswith("train loss 1.9000 nats per token after 7 steps; the dataset has no validation text")
