"""Run a function on W local gloo ranks of a persistent pool.

    def body(rank: int, x: int) -> int:      # at module level; runs with an initialised default gloo group
        ...

    with RankPools() as pools:
        assert pools.run(4, body, 3) == [...]

Where processes can be forked (Linux), ranks are forked from one process that has imported everything (see ``warm``),
which costs a rank 15 ms instead of the two seconds of CPU that torch takes to be imported; elsewhere each is spawned.
The processes of each world size stay alive between calls. Every call gets a fresh default process group over a file
store. A rank that raises has its exception raised here, with a note that names the rank; a rank that hangs or dies
replaces the pool, and the error shows where each rank stood.
"""

import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from moetrain.testing.rank import Failure, FunctionPlace, Place, serve

START_TIMEOUT_S = 120.0
MOST_PROCESSES = 24  # idle pools, least recently used first, make room; pools of 1, 2, 3, 4, 6 and 8 ranks do not
GRACE_S = 10.0  # that other ranks get after one has failed
PATIENCE_S = 5.0  # that ranks get to end by themselves
WARM = "moetrain.testing.warm"
Function = Callable[..., Any] | str
Start = Literal["fork", "spawn"]
DEFAULT_START: Start = "fork" if sys.platform == "linux" else "spawn"


class RankPoolError(RuntimeError):
    """A rank hung, died, or raised something that cannot be sent."""


class RankTimeoutError(RankPoolError):
    """A rank did not answer in time."""


def start_process(target: Callable[..., object], *args: Any, start: Start | None = None) -> Any:
    """A process that calls ``target(*args)``; it ends with this one.

    Args:
        target: a function at the top level of a module that can be imported by its name.
        args: picklable, or connections.
        start: see ``RankPools``.
    """
    start = start or DEFAULT_START
    context: Any = multiprocessing.get_context("forkserver" if start == "fork" else "spawn")
    if start == "fork":
        context.set_forkserver_preload([WARM])
    process = context.Process(target=target, args=args, daemon=True)
    with _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"), _no_main_file():
        process.start()
    return process


class RankPools:
    """A pool per world size, made when first asked for and replaced once broken; a context manager.

    Args:
        timeout_s: for each call, and for each of its collectives, where the call names no other.
        strict: whether a warning in a rank is an error.
        start: how processes begin: "fork" from a warmed one, or "spawn" with imports and a hash seed of their own. By
            default what the platform can do.
    """

    def __init__(self, *, timeout_s: float = 120.0, strict: bool = False, start: Start | None = None) -> None:
        self.timeout_s = timeout_s
        self._strict = strict
        self._start = start or DEFAULT_START
        self._pools: dict[int, RankPool] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="moetrain-ranks-")
        self._num_made = 0

    @property
    def folder(self) -> Path:
        """A folder that lives as long as the pools."""
        return Path(self._folder.name)

    def run(self, world_size: int, fn: Function, *args: Any, timeout: float | None = None) -> list[Any]:
        """Call ``fn(rank, *args)`` on every rank; return the results in rank order.

        Args:
            world_size: W, number of ranks.
            fn: a function at the top level of a module; or "module:name", where to import it here would be a waste.
            args: picklable; tensors travel by value.
            timeout: seconds for the call, and for each of its collectives; workers' imports come before it.

        Raises:
            RankPoolError: a rank hung or died; the pool is replaced.
            Exception: what the first rank to fail raised, of its own type, with a note that names the rank.
        """
        replies = self.replies(world_size, fn, *args, timeout=timeout)
        failures = [(reply.at_s, rank) for rank, reply in enumerate(replies) if isinstance(reply, Failure)]
        if failures:
            _, rank = min(failures)
            raise _exception(rank, world_size, replies[rank])
        return replies

    def replies(self, world_size: int, fn: Function, *args: Any, timeout: float | None = None) -> list[Any]:
        """Like ``run``, but a rank that raised has its ``Failure`` among the results.

        Raises:
            RankPoolError: a rank hung or died; the pool is replaced.
        """
        pool = self.prepare(world_size)
        try:
            return pool.call(fn, args, self.timeout_s if timeout is None else timeout)
        except RankPoolError:
            self.drop(world_size, patience_s=0.0)
            raise

    def prepare(self, world_size: int) -> "RankPool":
        """Start the processes that a call would start, and do not wait for them."""
        pool = self._pools.pop(world_size, None)
        if pool is not None and not pool.alive():
            pool.close(0.0)
            pool = None
        while pool is None and self._pools and sum(self._pools) + world_size > MOST_PROCESSES:
            self.drop(next(iter(self._pools)))
        if pool is None:
            self._num_made += 1
            folder = self.folder / f"pool{self._num_made}"
            folder.mkdir()
            pool = RankPool(world_size, folder, strict=self._strict, start=self._start)
        self._pools[world_size] = pool  # the most recently used is the last
        return pool

    def drop(self, world_size: int, patience_s: float = PATIENCE_S) -> None:
        """End the processes of one world size; the next call starts new ones."""
        pool = self._pools.pop(world_size, None)
        if pool is not None:
            pool.close(patience_s)

    def end(self) -> None:
        """End all processes; a later call starts new ones."""
        for world_size in list(self._pools):
            self.drop(world_size)

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


class RankPool:
    """The processes of one world size, seen from outside."""

    def __init__(self, world_size: int, folder: Path, *, strict: bool, start: Start) -> None:
        self.world_size = world_size
        self._folder = folder
        self._calls = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            place = Place(rank, world_size, self._trace(rank), strict)
            self._processes.append(start_process(serve, place, theirs, start=start))
            theirs.close()
            self._pipes.append(ours)
        self._started = False

    def alive(self) -> bool:
        """Whether every process lives."""
        return all(process.is_alive() for process in self._processes)

    def call(self, fn: Function, args: tuple[Any, ...], timeout: float) -> list[Any]:
        """What ``fn(rank, *args)`` returned on each rank, or its ``Failure``.

        Raises:
            RankPoolError: a rank hung or died; the pool is of no more use.
        """
        if not self._started:
            self._collect(START_TIMEOUT_S, "start-up")
            self._started = True
        where = _locate(fn)
        payload = pickle.dumps(args)
        store = str(self._folder / f"store-{self._calls}")
        self._calls += 1
        name = f"{where[2]} of {where[0]}"
        replies = self._ask(("load", where, payload, store, timeout), f"preparing {name}", START_TIMEOUT_S)
        if not any(isinstance(reply, Failure) for reply in replies):
            replies = self._ask(("run",), name, timeout)
        self._ask(("finish",), f"leaving {name}", START_TIMEOUT_S)
        return [pickle.loads(reply) if isinstance(reply, bytes) else reply for reply in replies]

    def close(self, patience_s: float) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("stop",))
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()

    def _ask(self, message: tuple[Any, ...], doing: str, timeout: float) -> list[Any]:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a dead rank is reported where its answer is missing
                pipe.send(message)
        return self._collect(timeout, doing)

    def _collect(self, timeout: float, doing: str) -> list[Any]:
        """One reply per rank. After a first failure the others have ``GRACE_S`` seconds."""
        deadline = time.monotonic() + timeout
        replies: dict[int, Any] = {}
        while len(replies) < self.world_size:
            open_ranks = [rank for rank in range(self.world_size) if rank not in replies]
            sources: list[Any] = [self._pipes[rank] for rank in open_ranks]
            sources += [self._processes[rank].sentinel for rank in open_ranks]
            ready = wait(sources, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = f"did not answer within {timeout:g} s"
                raise RankTimeoutError(self._lost(doing, late, open_ranks, replies))
            for rank in open_ranks:
                with contextlib.suppress(EOFError, OSError):
                    if self._pipes[rank].poll():
                        replies[rank] = self._pipes[rank].recv()
                if isinstance(replies.get(rank), Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                elif rank not in replies and self._processes[rank].sentinel in ready:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    raise RankPoolError(self._lost(doing, f"died (exit code {code})", [rank], replies))
        return [replies[rank] for rank in range(self.world_size)]

    def _lost(self, doing: str, what: str, lost: list[int], replies: dict[int, Any]) -> str:
        """What each rank had raised, or where it stood, by its own account."""
        waiting = [rank for rank in range(self.world_size) if rank not in replies]
        for rank in waiting:
            if self._processes[rank].is_alive():
                with contextlib.suppress(OSError, ProcessLookupError):
                    os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)  # for them to write it down; this path ends the pool anyway
        lines = [f"rank(s) {', '.join(map(str, lost))} of {self.world_size} {what} in {doing}"]
        for rank in range(self.world_size):
            reply = replies.get(rank)
            if isinstance(reply, Failure):
                lines.append(f"--- rank {rank} had raised:\n{reply.text}")
            elif reply is not None:
                lines.append(f"--- rank {rank} had finished")
            else:
                trace = self._trace(rank)
                text = trace.read_text() if trace.exists() else ""
                lines.append(f"--- rank {rank} stood at:\n{text or '(nothing recorded)'}")
        return "\n".join(lines)

    def _trace(self, rank: int) -> Path:
        return self._folder / f"trace-{rank}"


def _exception(rank: int, world_size: int, failure: Failure) -> BaseException:
    note = f"on rank {rank} of {world_size}:\n{failure.text}"
    if failure.pickled is None:
        return RankPoolError(note)
    try:
        error: BaseException = pickle.loads(failure.pickled)
    except Exception:
        return RankPoolError(note)
    error.add_note(note)
    return error


def _locate(fn: Function) -> FunctionPlace:
    """(file, module name, qualified name): pytest's import mode leaves test modules unimportable by name."""
    if isinstance(fn, str):
        module, _, name = fn.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        return str(Path(spec.origin).resolve()), module, name
    if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
        raise ValueError(f"ranks cannot run {fn.__qualname__}: it must be at the top level of a module; move it there")
    return str(Path(inspect.getfile(fn)).resolve()), fn.__module__, fn.__qualname__


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Children inherit the environment of the moment they, or the process that they are forked from, start."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _no_main_file() -> Iterator[None]:
    """Keep children from importing pytest's, xdist's or a script's main module again."""
    main = sys.modules["__main__"]
    names = ("__file__", "__spec__")
    before: dict[str, Any] = {name: main.__dict__[name] for name in names if name in main.__dict__}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(before)
