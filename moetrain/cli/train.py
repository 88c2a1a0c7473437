"""``moetrain train``: one process, or every rank of a ``torchrun``.

The configuration is read and checked before torch is imported, so that a mistake costs a fraction of a second.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from moetrain.config import RunConfig
from moetrain.config.load import load_run, options_help

USAGE = """usage: moetrain train [options]
       torchrun --standalone --nproc-per-node N -m moetrain train [options]

Train a model, going on from the newest checkpoint of the run folder where there is one.

  moetrain train --preset tiny --data.path corpora/quickstart --run-dir runs/tiny

options:
"""
DEBUG = "MOETRAIN_DEBUG"  # set it to see the whole traceback of every error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 refused before anything was started."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        sys.stdout.write(USAGE + options_help() + "\n")
        return 0
    try:
        run = load_run(arguments)
        run.validate_for(_world_size())
    except (ValueError, TypeError) as error:
        return _complain(error, 2, first_rank_only=True)
    return _train(run)


def _train(run: RunConfig) -> int:
    import torch.distributed as dist

    from moetrain.train.loop import train

    logging.basicConfig(level=logging.WARNING if _rank() == 0 else logging.ERROR, format="moetrain: %(message)s")
    try:
        train(run)
    except KeyboardInterrupt:
        return _leave(130)
    except Exception as error:
        if not dist.is_initialized() and isinstance(error, (ValueError, TypeError)):
            return _complain(error, 2, first_rank_only=True)
        if _speaks_for_itself(error):
            return _leave(_complain(error, 1))
        traceback.print_exc()
        return _leave(1)
    return 0


def _speaks_for_itself(error: Exception) -> bool:
    """Whether the message says what to do, so that a traceback would only hide it."""
    from moetrain.checkpoint import CorruptCheckpointError
    from moetrain.train.engine import NonFiniteGradientError

    if isinstance(error, (ValueError, FloatingPointError, CorruptCheckpointError, NonFiniteGradientError)):
        return True
    return isinstance(error, RuntimeError) and "closed by peer" in str(error)


def _complain(error: Exception, code: int, *, first_rank_only: bool = False) -> int:
    """One sentence on stderr. What every rank finds alike is said by the first alone."""
    if DEBUG in os.environ:
        traceback.print_exception(error)
    if not first_rank_only or _rank() == 0:
        who = "moetrain" if first_rank_only or _world_size() == 1 else f"moetrain: rank {_rank()}"
        sys.stderr.write(f"{who}: {error}\n")
    return code


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
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
