"""The command ``moetrain``: finds the subcommand and runs it. Nothing heavy is imported before it is needed."""

import sys
from collections.abc import Sequence
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
        "doctor": "show what this machine has, what is missing, and the cure",
    }
)
NOT_BUILT: MappingProxyType[str, str] = MappingProxyType(
    {
        "report": "read metrics.jsonl and summary.json in the run folder",
        "sample": "use Transformer.logits from Python",
        "placement": "print moetrain.placement.static.plan_static from Python",
        "sequences": "print moetrain.sequence.data_planner.plan_data from Python",
        "convert": "read the safetensors files of a checkpoint from Python",
        "align": "train without it",
        "plan": "choose the mesh by hand and check it with `moetrain verify`",
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moetrain``; returns the exit code: 0 done, 1 failed, 2 refused, 3 checked and finished, 130 interrupted."""
    outputs = make_output_patient()
    arguments = list(sys.argv[1:] if argv is None else argv)
    who = next(iter(arguments), "moetrain")
    try:
        code = _run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write(f"moetrain: {who} was interrupted\n")
        return 130
    if failure := lost_output(outputs):
        sys.stderr.write(f"moetrain: what {who} says could not be written: {failure.strerror}\n")
        return code or 1
    return code


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
    lines += [f"  {name:<8} {text}" for name, text in COMMANDS.items()]
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
