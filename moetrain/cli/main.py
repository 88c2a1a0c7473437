"""The command ``moetrain``: finds the subcommand and runs it. Nothing heavy is imported before it is needed."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import MappingProxyType

from moetrain import __version__
from moetrain.cli.output import lost_output, make_output_patient
from moetrain.config.errors import nearest

COMMANDS: MappingProxyType[str, str] = MappingProxyType(
    {
        "train": "train a model",
        "prep": "turn folders of text into a dataset",
        "verify": "prove that a parallelism computes what one process computes",
        "mesh": "show who stands where in a folding, and which axes cross nodes",
        "placement": "show what planners of experts would have made of a run's loads",
        "sequences": "show how a planner would deal sequences out to ranks",
        "doctor": "show what this machine has, what is missing, and the cure",
    }
)
NOT_BUILT: MappingProxyType[str, str] = MappingProxyType(
    {
        "report": "read metrics.jsonl and summary.json in the run folder",
        "sample": "use Transformer.logits from Python",
        "convert": "read the safetensors files of a checkpoint from Python",
        "align": "train without it",
        "plan": "choose the mesh by hand and check it with `moetrain verify`",
    }
)
CLEANING = frozenset({"prep", "verify"})  # commands that have something to take down when they are told to end
TERMINATED = 128 + signal.SIGTERM  # exit code, as a shell gives it


class _TerminatedError(BaseException):
    """SIGTERM came."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moetrain``; returns the exit code.

    0 done, 1 failed, 2 refused, 3 checked and finished, 130 interrupted, 143 ended by SIGTERM.
    """
    outputs = make_output_patient()
    arguments = list(sys.argv[1:] if argv is None else argv)
    who = next(iter(arguments), "moetrain")
    try:
        with _ending_in_order(who):
            code = _run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write(f"moetrain: {who} was interrupted\n")
        return 130
    except _TerminatedError:
        sys.stderr.write(f"moetrain: {who} was ended by SIGTERM\n")
        return TERMINATED
    if failure := lost_output(outputs):
        sys.stderr.write(f"moetrain: what {who} says could not be written: {failure.strerror}\n")
        return code or 1
    return code


@contextmanager
def _ending_in_order(command: str) -> Iterator[None]:
    """Let SIGTERM take down what a command has made, as Ctrl-C does; a second one ends it at once.

    Training is ended by it at once: ranks may wait for one another, and what is saved is whole.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if command not in CLEANING or not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _TerminatedError

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version", "version"):
        sys.stdout.write(f"moetrain {__version__}\n")
        return 0
    if command in COMMANDS:
        return int(import_module(f"moetrain.cli.{command}").main(rest))
    if command in NOT_BUILT:
        return refuse(f"`moetrain {command}` is not built yet; {NOT_BUILT[command]}")
    near = nearest(command, [*COMMANDS, *NOT_BUILT])
    hint = f"did you mean `moetrain {near}`?" if near else "see `moetrain --help`"
    return refuse(f"unknown command {command!r}; {hint}")


def usage() -> str:
    """The text of ``moetrain --help``."""
    lines = ["usage: moetrain COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    lines += [
        "",
        f"not built yet: {', '.join(NOT_BUILT)}",
        "",
        "`moetrain COMMAND --help` shows the command's options.",
    ]
    return "\n".join(lines) + "\n"


def refuse(text: str) -> int:
    """Say in one sentence why nothing was done; returns exit code 2."""
    sys.stderr.write(f"moetrain: {text}\n")
    return 2
