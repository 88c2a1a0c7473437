"""Run a function on W local gloo ranks of a persistent pool.

    from ranks import run_on_ranks

    def body(rank: int, x: int) -> int:      # at module level; runs with an initialised default gloo group
        ...

    def test_it() -> None:
        assert run_on_ranks(4, body, 3) == [...]

Start-up costs seconds per rank, so the worker processes of each world size stay alive between tests. Every call gets
a fresh default process group over a file store. A rank that raises has its exception raised here, with a note that
names the rank; a rank that hangs or dies replaces the pool, and the error shows where each rank stood.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

START_TIMEOUT_S = 120.0
MOST_PROCESSES = 16  # idle pools, least recently used first, make room
GRACE_S = 10.0  # that other ranks get after one has failed


class RankPoolError(RuntimeError):
    """A rank hung, died, or raised something that cannot be sent."""


@dataclass
class _Failure:
    """What a rank raised and when: the pickled exception where it can be, and its traceback as text."""

    at_s: float  # on the machine's monotonic clock: the first failure is the cause of the others
    pickled: bytes | None
    text: str


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``fn(rank, *args)`` on every rank; return the results in rank order.

    Args:
        world_size: W, number of ranks.
        fn: a function at the top level of a module.
        args: picklable; tensors travel by value.
        timeout: seconds for the call, and for each of its collectives; workers' imports come before it.

    Raises:
        RankPoolError: a rank hung or died; the pool is replaced.
        Exception: what the first rank to fail raised, of its own type, with a note that names the rank.
    """
    pools = _pools()
    pool = pools.get(world_size)
    if pool is None or not pool.alive():
        _drop(world_size)
        while pools and sum(pools) + world_size > MOST_PROCESSES:
            _drop(next(iter(pools)))
        pool = RankPool(world_size)
    pools.pop(world_size, None)
    pools[world_size] = pool  # most recently used
    try:
        return pool.run(fn, args, timeout)
    except RankPoolError:
        _drop(world_size, patience_s=0.0)
        raise


@functools.cache
def _pools() -> dict[int, "RankPool"]:
    atexit.register(_drop_all)
    return {}


def _drop(world_size: int, patience_s: float = 5.0) -> None:
    pool = _pools().pop(world_size, None)
    if pool is not None:
        pool.close(patience_s)


def _drop_all() -> None:
    for world_size in list(_pools()):
        _drop(world_size)


class RankPool:
    """The worker processes of one world size, seen from the test."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._folder = Path(tempfile.mkdtemp(prefix="moetrain-ranks-"))
        self._calls = 0
        self._processes = []
        self._pipes: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        with _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"), _no_main_file():
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, world_size, theirs, self._trace_path(rank)), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        try:
            self._collect(time.monotonic() + START_TIMEOUT_S, "start-up", grace=GRACE_S)
        except RankPoolError:
            self.close(patience_s=0.0)
            raise

    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        where = _locate(fn)
        payload = pickle.dumps(args)
        store = str(self._folder / f"store-{self._calls}")
        self._calls += 1
        name = f"{where[2]} of {where[0]}"
        replies = self._ask(("load", where, payload, store, timeout), f"preparing {name}", START_TIMEOUT_S)
        if not any(isinstance(reply, _Failure) for reply in replies):
            replies = self._ask(("run",), name, timeout)
        self._ask(("finish",), f"leaving {name}", START_TIMEOUT_S)
        self._raise_first(replies)
        return [pickle.loads(reply) for reply in replies]

    def close(self, patience_s: float) -> None:
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
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, message: tuple[Any, ...], doing: str, timeout: float) -> list[Any]:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a dead rank is reported where its answer is missing
                pipe.send(message)
        return self._collect(time.monotonic() + timeout, doing, grace=GRACE_S)

    def _raise_first(self, replies: list[Any]) -> None:
        failures = [(reply.at_s, rank) for rank, reply in enumerate(replies) if isinstance(reply, _Failure)]
        if failures:
            _, rank = min(failures)
            raise self._exception(rank, replies[rank])

    def _collect(self, deadline: float, doing: str, *, grace: float) -> list[Any]:
        """One reply per rank. After a first failure the others have ``grace`` seconds."""
        replies: dict[int, Any] = {}
        while len(replies) < self.world_size:
            open_ranks = [rank for rank in range(self.world_size) if rank not in replies]
            sources: list[Any] = [self._pipes[rank] for rank in open_ranks]
            sources += [self._processes[rank].sentinel for rank in open_ranks]
            ready = wait(sources, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._lost(doing, "did not answer in time", open_ranks, replies)
            for rank in open_ranks:
                with contextlib.suppress(EOFError, OSError):
                    if self._pipes[rank].poll():
                        replies[rank] = self._pipes[rank].recv()
                if isinstance(replies.get(rank), _Failure):
                    deadline = min(deadline, time.monotonic() + grace)
                elif rank not in replies and self._processes[rank].sentinel in ready:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    raise self._lost(doing, f"died (exit code {code})", [rank], replies)
        return [replies[rank] for rank in range(self.world_size)]

    def _lost(self, doing: str, what: str, lost: list[int], replies: dict[int, Any]) -> RankPoolError:
        waiting = [rank for rank in range(self.world_size) if rank not in replies]
        for rank in waiting:
            if self._processes[rank].is_alive():
                with contextlib.suppress(OSError, ProcessLookupError):
                    os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)  # for the dumps to be written; this path ends a test run's pool anyway
        lines = [f"rank(s) {', '.join(map(str, lost))} of {self.world_size} {what} in {doing}"]
        for rank in range(self.world_size):
            reply = replies.get(rank)
            if isinstance(reply, _Failure):
                lines.append(f"--- rank {rank} had raised:\n{reply.text}")
            elif reply is not None:
                lines.append(f"--- rank {rank} had finished")
            else:
                trace = Path(self._trace_path(rank))
                text = trace.read_text() if trace.exists() else ""
                lines.append(f"--- rank {rank} stood at:\n{text or '(nothing recorded)'}")
        return RankPoolError("\n".join(lines))

    def _exception(self, rank: int, failure: _Failure) -> BaseException:
        note = f"on rank {rank} of {self.world_size}:\n{failure.text}"
        if failure.pickled is None:
            return RankPoolError(note)
        try:
            error = pickle.loads(failure.pickled)
        except Exception:
            return RankPoolError(note)
        error.add_note(note)
        return error

    def _trace_path(self, rank: int) -> str:
        return str(self._folder / f"trace-{rank}")


def _locate(fn: Callable[..., Any]) -> tuple[str, str, str]:
    """(file, module name, qualified name): pytest's import mode leaves test modules unimportable by name."""
    if "<locals>" in fn.__qualname__ or "<lambda>" in fn.__qualname__:
        raise ValueError(f"run_on_ranks: {fn.__qualname__} must be a function at the top level of a module; move it")
    return str(Path(inspect.getfile(fn)).resolve()), fn.__module__, fn.__qualname__


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Children inherit the environment of the moment they start."""
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
    """Keep spawn from importing pytest's, xdist's or a script's main module again in every worker."""
    main = sys.modules["__main__"]
    before = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(before)


# What follows runs in the workers.


def _serve(rank: int, world_size: int, pipe: Connection, trace_path: str) -> None:
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test process decides
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with open(trace_path, "w") as trace:
        faulthandler.register(signal.SIGUSR1, file=trace, all_threads=True)
        pipe.send("ready")
        call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        while True:
            try:
                kind, *rest = pipe.recv()
            except EOFError:
                return
            if kind == "stop":
                return
            if kind == "load":
                call = reply = _attempt(functools.partial(_prepare, rank, world_size, *rest))
                pipe.send(reply if isinstance(reply, _Failure) else "prepared")
            elif kind == "run":
                reply = _attempt(functools.partial(_call, rank, *call))
                if isinstance(reply, _Failure):
                    _leave(dist)  # unblocks ranks that wait for this one
                pipe.send(reply)
            else:
                call = None
                _leave(dist)
                pipe.send("left")
                gc.collect()  # groups that hang in cycles of references, whose threads would go on waking
                gc.freeze()


def _attempt(action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or the failure."""
    try:
        return action()
    except BaseException as error:
        at_s = time.monotonic()
        text = traceback.format_exc()
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)
        except Exception:
            pickled = None
        return _Failure(at_s, pickled, text)


def _prepare(
    rank: int, world_size: int, where: tuple[str, str, str], payload: bytes, store_path: str, timeout: float
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Import the function and make the default group.

    Nothing runs before every rank is here: a rank that failed at once would tear down connections that others are
    still making, and gloo then tries for ever.
    """
    import torch
    import torch.distributed as dist

    fn = functools.reduce(getattr, where[2].split("."), _module(where[0], where[1]))
    args = pickle.loads(payload)
    torch.manual_seed(0)
    store = dist.FileStore(store_path, world_size)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    return fn, args


def _call(rank: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    return pickle.dumps(fn(rank, *args))


def _leave(dist: Any) -> None:
    """Destroy this call's groups, and what torch remembers of meshes made of them."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:  # its caches hold meshes that are equal, but of dead groups
        debug = importlib.import_module("torch.distributed.tensor.debug")
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()


def _module(path: str, name: str) -> ModuleType:
    """The module ``name`` if that is the file at ``path``; else that file, registered under the name."""
    name = "__mp_main__" if name == "__main__" else name  # a script's own main part must not run again
    found = sys.modules.get(name)
    if found is None:
        with contextlib.suppress(ImportError):
            found = importlib.import_module(name)
    if found is not None and Path(getattr(found, "__file__", None) or "").resolve() == Path(path):
        return found
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
