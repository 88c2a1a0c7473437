"""One of the processes of a ``RankPool``: it calls the functions that it is told, each in a fresh default group."""

import contextlib
import faulthandler
import functools
import gc
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

FunctionPlace = tuple[str, str, str]  # file, module name, qualified name


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands.

    Attributes:
        rank: its own.
        world_size: W, of its pool.
        trace: file in which it says where it is when it gets SIGUSR1.
        strict: whether warnings are errors.
    """

    rank: int
    world_size: int
    trace: Path
    strict: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank raised and when: the pickled exception where it can be, and its traceback as text."""

    at_s: float  # on the machine's monotonic clock: the first failure is the cause of the others
    pickled: bytes | None
    text: str


def serve(place: Place, pipe: Connection) -> None:
    """What the process runs, until it is told to stop or the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides
    share_cores(place.world_size)
    if place.strict:
        warnings.simplefilter("error")
    try:
        trace = place.trace.open("w")
    except FileNotFoundError:  # the process that asks has ended meanwhile, and removed its folder
        return
    with trace, contextlib.suppress(EOFError, ConnectionError):  # it may end at any time
        faulthandler.register(signal.SIGUSR1, file=trace, all_threads=True)
        import torch  # not before, so that a process that is not forked too says where it stands

        torch.set_num_threads(1)
        pipe.send("ready")
        call: Any = None
        while (message := pipe.recv())[0] != "stop":
            call = _answer(place, pipe, message, call)


def _answer(place: Place, pipe: Connection, message: tuple[Any, ...], call: Any) -> Any:
    """Do one of the three parts of a call; returns what the next part needs."""
    kind, *rest = message
    if kind == "load":
        call = _attempt(functools.partial(_prepare, place, *rest))
        pipe.send(call if isinstance(call, Failure) else "prepared")
        return call
    if kind == "run":
        fn, args = call
        reply = _attempt(lambda: pickle.dumps(fn(place.rank, *args)))
        if isinstance(reply, Failure):
            _leave()  # unblocks ranks that wait for this one
        pipe.send(reply)
        return None
    _leave()
    pipe.send("left")
    # Engines are cycles of references that hold process groups, and each group's threads wake 100 times a second; by
    # itself the collector comes after hundreds of groups, when a call takes several times as long.
    gc.collect()
    gc.freeze()
    return None


def share_cores(ranks: int) -> None:
    """Where ranks outnumber cores, let none interrupt another for each message that arrives.

    With Linux's batch scheduling a rank keeps its core until it waits itself: 8 ranks on 2 cores take a case in 0.7 of
    the time. Threads made later inherit it.
    """
    if sys.platform == "linux" and ranks > len(os.sched_getaffinity(0)):
        with contextlib.suppress(PermissionError):  # a sandbox may forbid it; then it is only slower
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


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
        return Failure(at_s, pickled, text)


def _prepare(
    place: Place, where: FunctionPlace, payload: bytes, store_path: str, timeout: float
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
    meet, limit = f"file://{store_path}", timedelta(seconds=timeout)
    dist.init_process_group("gloo", meet, rank=place.rank, world_size=place.world_size, timeout=limit)
    return fn, args  # type: ignore[return-value]


def _leave() -> None:
    """Destroy this call's groups, and what torch remembers of meshes made of them."""
    import torch.distributed as dist

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
