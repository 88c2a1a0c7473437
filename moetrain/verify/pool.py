"""Local worker processes, kept between cases because starting them costs seconds per rank."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moetrain.verify.errors import StepErrors
from moetrain.verify.spec import VerifySpec

Case = tuple[VerifySpec, Path]  # with the seed that was used; what ``save_expected`` wrote for it
GRACE_S = 5.0  # after one rank has failed, how long the others may take to say so too


class RunFailedError(RuntimeError):
    """The parallel run did not finish: a rank raised, died, or was not heard of in time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker process stands."""

    rank: int
    ranks: int
    store: Path  # file through which the ranks find each other
    timeout_s: float

    @property
    def stood(self) -> Path:
        """File in which the process says where it stands, when it gets SIGUSR1."""
        return self.store.with_name(f"stood-{self.rank}")


def _share_cores(ranks: int) -> None:
    """Where ranks outnumber cores, let none interrupt another for each message that arrives.

    With Linux's batch scheduling a rank keeps its core until it waits itself: 8 ranks on 2 cores take a case in 0.7 of
    the time. Threads made later inherit it.
    """
    if sys.platform == "linux" and ranks > len(os.sched_getaffinity(0)):
        with contextlib.suppress(PermissionError):  # a sandbox may forbid it; then it is only slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _work(place: Place, pipe: Connection) -> None:
    """What a worker process runs. Only it imports the training engine, so that refusals come quickly."""
    with place.stood.open("w") as stood:
        faulthandler.register(signal.SIGUSR1, file=stood)
        _share_cores(place.ranks)
        from moetrain.verify.worker import serve

        serve(place, pipe)


class RankPool:
    """``ranks`` processes that run cases together; unusable, and ``broken``, once a case has failed."""

    def __init__(self, ranks: int, folder: Path, timeout_s: float) -> None:
        self.ranks = ranks
        self.timeout_s = timeout_s
        self.broken = False
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._places: list[Place] = []
        for rank in range(ranks):
            here, there = context.Pipe()
            place = Place(rank, ranks, folder / "store", timeout_s)
            process = context.Process(target=_work, args=(place, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
            self._places.append(place)
        self._gather("start")

    def run(self, spec: VerifySpec, expected_path: Path) -> list[StepErrors]:
        """The errors of each step of one case, the worst over ranks.

        Raises:
            RunFailedError: naming the ranks and what they said.
        """
        return self.run_all([(spec, expected_path)])[0]

    def run_all(self, cases: Sequence[Case]) -> list[list[StepErrors]]:
        """The errors of each step of several cases of one mesh and mutation, which share what they can.

        Raises:
            RunFailedError: naming the ranks and what they said; which case it was is not known.
        """
        for pipe in self._pipes:
            pipe.send(cases)
        of_ranks = self._gather("run the case")
        return [
            [StepErrors.worst(list(of_step)) for of_step in zip(*of_case, strict=True)]
            for of_case in zip(*of_ranks, strict=True)
        ]

    def _gather(self, task: str) -> list[Any]:
        """One answer of each rank; a string is the traceback of a failure."""
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(answers) + len(failures) < self.ranks:
            open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers and rank not in failures]
            ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                answer = self._receive(rank)
                if isinstance(answer, str):
                    failures[rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                else:
                    answers[rank] = answer
        if len(answers) < self.ranks:
            told = self._tell(task, answers, failures)
            self.close(kill=True)
            raise RunFailedError(told)
        return [answers[rank] for rank in range(self.ranks)]

    def _receive(self, rank: int) -> Any:
        try:
            return self._pipes[rank].recv()
        except EOFError:
            process = self._processes[rank]
            process.join(timeout=1.0)
            return f"the process ended with exit code {process.exitcode}"

    def _tell(self, task: str, answers: dict[int, Any], failures: dict[int, str]) -> str:
        silent = [rank for rank in range(self.ranks) if rank not in answers and rank not in failures]
        lines = [f"rank {rank} failed to {task}: {failures[rank].strip()}" for rank in sorted(failures)]
        if silent:
            lines.append(
                f"no answer from ranks {silent} of {self.ranks} when asked to {task}"
                + ("" if failures else f", within {self.timeout_s:g} s; raise --timeout on a slow machine")
            )
        return "\n".join(lines + self._where(silent))

    def _where(self, silent: list[int]) -> list[str]:
        """Where each silent rank stands, by its own account."""
        for rank in silent:
            os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.3 if silent else 0.0)  # for them to write it down
        files = [self._places[rank].stood for rank in silent]
        texts = [file.read_text() if file.exists() else "" for file in files]
        return [
            f"rank {rank} stood at:\n{text or '(it had not begun)'}" for rank, text in zip(silent, texts, strict=True)
        ]

    def close(self, *, kill: bool = False) -> None:
        """End the processes; later calls do nothing."""
        self.broken = True
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kill:
                process.kill()
            process.join(timeout=10.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []


class RankPools:
    """A pool per world size, made when first asked for and replaced once broken; a context manager."""

    def __init__(self, *, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._pools: dict[int, RankPool] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="moetrain-verify-")
        self._num_made = 0

    @property
    def folder(self) -> Path:
        """A folder that lives as long as the pools."""
        return Path(self._folder.name)

    def pool(self, ranks: int) -> RankPool:
        """A pool of ``ranks`` processes that is ready for a case."""
        if ranks not in self._pools or self._pools[ranks].broken:
            self._num_made += 1
            home = self.folder / f"pool{self._num_made}"
            home.mkdir()
            self._pools[ranks] = RankPool(ranks, home, self._timeout_s)
        return self._pools[ranks]

    def end(self) -> None:
        """End all processes; a later ``pool`` starts new ones."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def close(self) -> None:
        """End all processes and remove the folder."""
        self.end()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
