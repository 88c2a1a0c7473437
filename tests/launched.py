"""Ranks of a command of moetrain, each told its place as a launcher tells it, forked from the suite's warmed process.

Every rank is a process of its own with its own environment, and runs the command from its arguments to its exit code;
only the imports are not done again, which cost more than such a run. Some tests use torchrun itself.
"""

import faulthandler
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from moetrain.testing.ranks import start_process

ROOT = Path(__file__).parents[1]
GRACE_S = 20.0  # that other ranks get after one has failed


class Launched:
    """One process per rank, started.

    Args:
        commands: of each rank, the words after ``moetrain``.
        folder: gets what ranks say, in files.
        places: of each rank, what its environment adds to RANK, WORLD_SIZE and what follows from them.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], folder: Path, places: Sequence[Mapping[str, str]] | None = None
    ) -> None:
        world = str(len(commands))
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        folder.mkdir(parents=True, exist_ok=True)
        self._said = []
        self.processes = []
        for rank, words in enumerate(commands):
            files = [folder / f"{name}-{time.monotonic_ns()}-{rank}" for name in ("out", "err")]
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **(places[rank] if places else {})}
            self.processes.append(start_process(_run_command, list(words), {**shared, **own}, *map(str, files)))
            self._said.append(files)

    def said(self, rank: int) -> tuple[str, str]:
        """What a rank wrote to standard output and to standard error."""
        out, err = (path.read_text() if path.exists() else "" for path in self._said[rank])
        return out, err

    def poll(self) -> int | None:
        """The first exit code that is not 0; 0 once all ranks have ended so; None before."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    def kill(self) -> None:
        """End all ranks at once."""
        for process in self.processes:
            process.kill()
            process.join()

    def wait(self, timeout_s: float = 240.0) -> tuple[int, str, str]:
        """Exit code, output and errors of all ranks; after one has failed, the others have ``GRACE_S`` seconds.

        Raises:
            RuntimeError: they did not end in time, and were ended; where each rank stood is part of the text.
        """
        deadline = time.monotonic() + timeout_s
        while left := [process.sentinel for process in self.processes if process.exitcode is None]:
            if not wait(left, max(0.0, deadline - time.monotonic())):
                break
            if self.poll():
                deadline = min(deadline, time.monotonic() + GRACE_S)
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:  # all are stopped first: a rank that waits for another fails once that one is gone
            os.kill(process.pid, signal.SIGSTOP)
        for number in (signal.SIGABRT, signal.SIGCONT):  # a process that is stopped takes no other signal
            for process in late:
                os.kill(process.pid, number)
        for process in late:
            process.join()
        said = [self.said(rank) for rank in range(len(self.processes))]
        out, err = ("".join(parts) for parts in zip(*said, strict=True))
        if late:
            raise RuntimeError(f"the ranks did not end in {timeout_s:g} s\n{err}")
        return self.poll() or 0, out, err


def _run_command(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """What each process runs."""
    os.environ.update(environment)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    faulthandler.enable()
    sys.argv = ["moetrain", *words]
    from moetrain.cli.main import main

    sys.exit(main(words))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
