"""``moetrain train``: one process, or every rank of a ``torchrun``.

The configuration is read and checked before torch is imported, so that a mistake costs a fraction of a second.
"""

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from moetrain.config import RunConfig
from moetrain.config.errors import require
from moetrain.config.load import load_run
from moetrain.config.options import options_help
from moetrain.train.place import OwnPlaceError, Place
from moetrain.train.preflight import preflight
from moetrain.train.run_folder import summary_lines
from moetrain.train.source import base_of_start

USAGE = """usage: moetrain train [options]
       torchrun --standalone --nproc-per-node N -m moetrain train [options]

Train a model, going on from the newest checkpoint of the run folder where there
is one.

  moetrain train --preset tiny --data.path corpora/quickstart --run-dir runs/tiny

  --help GROUP
      Show the options of one group, such as moe, in place of all.
  --check RANKS
      Check everything for so many ranks and start nothing: exit code 0 where
      training can start, 2 where it cannot, 3 where the run folder holds this
      run finished (its result is shown).
  --fresh
      Move an earlier run in the run folder to a new folder beside it first.
      Under torchrun do so before the ranks start, with --check.

"""
HELP = ("-h", "--help")
FINISHED = 3  # exit code of --check
# How gloo and NCCL say, depending on what they were doing, that another rank is gone.
_PEER_ENDED = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited")
DEBUG = "MOETRAIN_DEBUG"  # set it to see the whole traceback of every error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 refused before anything was started."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if _place(arguments, *HELP) is not None:
        return _help(arguments)
    logging.basicConfig(level=logging.WARNING if _rank() == 0 else logging.ERROR, format="moetrain: %(message)s")
    try:
        arguments, check_ranks = _take_check(arguments)
        arguments, fresh = _take_fresh(arguments)
        if not check_ranks:
            Place.from_environment()
        run = load_run(arguments, base=base_of_start)
        if fresh:
            _set_aside(run, check_ranks or _world_size())
        folder = preflight(run, check_ranks or _world_size())
        if check_ranks and folder.path.is_dir():
            with folder.locked():
                pass
        result = folder.finished(run)
    except (ValueError, TypeError, OSError) as error:
        return _complain(error, 2, of_machine=True)
    if result is not None:
        if _rank() == 0:
            sys.stdout.write("\n".join([*summary_lines(result), f"run folder: {folder.path}"]) + "\n")
        return FINISHED if check_ranks else 0
    return 0 if check_ranks else _train(run)


def _help(arguments: list[str]) -> int:
    """Show all options, or those of the group that is named after ``--help``."""
    place = _place(arguments, *HELP)
    assert place is not None
    named = _value(arguments, place)
    try:
        shown = options_help(*named, width=shutil.get_terminal_size().columns)
    except ValueError as error:
        return _complain(error, 2, of_machine=True)
    sys.stdout.write(f"{'' if named else USAGE}{shown}\n")
    return 0


def _take_check(arguments: list[str]) -> tuple[list[str], int]:
    """The arguments without ``--check RANKS``, and the ranks; 0 where they do not say it."""
    place = _place(arguments, "--check")
    if place is None:
        return arguments, 0
    joined = "=" in arguments[place]
    text = "".join([arguments[place].partition("=")[2]] if joined else arguments[place + 1 : place + 2])
    require(
        text.isascii() and text.isdigit() and int(text) > 0,
        f"--check must be followed by a number of ranks of at least 1, got {text!r}; write for example --check 2",
    )
    rest = arguments[:place] + arguments[place + (1 if joined else 2) :]
    require(_place(rest, "--check") is None, "--check must be given once, got it twice; keep one of them")
    return rest, int(text)


def _take_fresh(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without ``--fresh``, and whether it was there."""
    place = _place(arguments, "--fresh")
    if place is None:
        return arguments, False
    value = _value(arguments, place)
    require(not value, f"--fresh takes no value, got {''.join(value)!r}; write --fresh alone")
    return _take_fresh(arguments[:place] + arguments[place + 1 :])[0], True


def _place(arguments: list[str], *names: str) -> int | None:
    """Where the first option of one of these names is, with or without ``=VALUE``."""
    return next((place for place, word in enumerate(arguments) if word.partition("=")[0] in names), None)


def _value(arguments: list[str], place: int) -> list[str]:
    """The value of the option there, after ``=`` or as the next word, if it has one."""
    _, joined, text = arguments[place].partition("=")
    return [text] if joined else [word for word in arguments[place + 1 : place + 2] if not word.startswith("-")]


def _set_aside(run: RunConfig, num_ranks: int) -> None:
    """Make room in the run folder, once all else about ``run`` is known to be right."""
    require(
        _world_size() == 1,
        "--fresh must be given to one process, not to every rank; run moetrain train --check RANKS --fresh beforehand",
    )
    folder = preflight(replace(run, train=replace(run.train, overwrite=True)), num_ranks)
    if aside := folder.set_aside():
        sys.stdout.write(f"moved the earlier run to {aside}\n")


def _train(run: RunConfig) -> int:
    import torch.distributed as dist

    from moetrain.train.loop import train

    try:
        train(run)
    except KeyboardInterrupt:
        if _is_first_of_machine():
            sys.stderr.write("moetrain: train was interrupted; start again to go on from the newest checkpoint\n")
        return _leave(130)
    except Exception as error:
        if not dist.is_initialized() and isinstance(error, (ValueError, TypeError)):
            return _complain(error, 2, of_machine=not isinstance(error, OwnPlaceError))
        if _speaks_for_itself(error):
            return _leave(_complain(error, 1))
        traceback.print_exc()
        return _leave(1)
    return 0


def _speaks_for_itself(error: Exception) -> bool:
    """Whether the message says what to do, so that a traceback would only hide it."""
    from moetrain.checkpoint import CorruptCheckpointError, UnsavedCheckpointError
    from moetrain.train.engine import NonFiniteGradientError

    ours = (CorruptCheckpointError, UnsavedCheckpointError, NonFiniteGradientError)
    if isinstance(error, (ValueError, OSError, FloatingPointError, *ours)):
        return True
    said = (*_PEER_ENDED, "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def _complain(error: Exception, code: int, *, of_machine: bool = False) -> int:
    """One sentence on stderr. What all ranks of a machine find alike is said by its first alone."""
    if DEBUG in os.environ:
        traceback.print_exception(error)
    if not of_machine or _is_first_of_machine():
        who = "moetrain" if of_machine or _world_size() == 1 else f"moetrain: rank {_rank()}"
        sys.stderr.write(f"{who}: {_plainly(error)}\n")
    return code


def _plainly(error: Exception) -> str:
    """The error's text; of one that only reports another rank's end, what it means."""
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_ENDED):
        return "another rank ended, and so does this one; start again to go on from the newest checkpoint"
    return str(error)


def _leave(code: int) -> int:
    """End at once where other ranks may wait for this one: its closed connections are what tells them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _world_size() > 1:
        _exit(code)
    return code


def _exit(code: int) -> NoReturn:
    os._exit(code)


def _rank() -> int:
    return _number("RANK", 0)


def _is_first_of_machine() -> bool:
    """Whether this rank speaks for those of its machine; one whose place there is not known speaks for itself."""
    try:
        return Place.from_environment().local_rank == 0
    except ValueError:
        return True


def _world_size() -> int:
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """What a launcher has set; ``Place.from_environment`` refuses what is no number."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default
