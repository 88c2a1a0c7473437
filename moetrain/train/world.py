"""This process among the others: what torchrun says, which device to use, and the default process group."""

import ctypes
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moetrain.config import TrainConfig
from moetrain.config.errors import require
from moetrain.train.place import OwnPlaceError, Place

_T = TypeVar("_T")


class RendezvousError(ConnectionError):
    """The ranks did not find one another."""


class RefusedByAllError(ValueError):
    """Raised on every rank alike, and nothing is under way between them: the process group can be taken down."""


class World(Place):
    """This process's place, and what it computes on."""

    __slots__ = ()

    def check_nodes(self, ranks_per_node: int) -> None:
        """Compare what the mesh thinks a node is with what torchrun started, where there are several.

        Raises:
            ValueError: they differ, so that traffic would be counted, and two-level dispatch sent, along wrong borders.
        """
        require(
            not self.launched or self.local_size in (ranks_per_node, self.size),
            f"mesh.ranks_per_node ({ranks_per_node}) must be the number of ranks on a node, but {self.local_size} of "
            f"{self.size} run on this one; set mesh.ranks_per_node to {self.local_size}",
        )

    def device(self, choice: str) -> torch.device:
        """The device of this rank; ``"auto"`` takes a GPU for each local rank, and the CPU where there is no GPU.

        Raises:
            OwnPlaceError: this process sees GPUs, but fewer than there are local ranks; or none, and ``"cuda"`` is
                asked for. A launcher that shows each rank its own GPU alone looks the same.
        """
        num_gpus = 0 if choice == "cpu" else torch.cuda.device_count()
        if choice == "cpu" or (choice == "auto" and num_gpus == 0):
            return torch.device("cpu")
        if num_gpus < self.local_size:
            see_all = (
                "let every rank see all GPUs of its machine (with Slurm: --gpus-per-node and --gpu-bind=none), or "
                f"start {num_gpus} rank(s) on it, or "
            )
            raise OwnPlaceError(
                f"train.device = {choice!r} needs a GPU for each of the {self.local_size} ranks of this machine, but "
                f"this one sees {num_gpus}; {see_all if num_gpus else ''}set train.device to 'cpu'"
            )
        return torch.device("cuda", self.local_rank)


def set_threads(train: TrainConfig, world: World) -> int:
    """Share the cores among this machine's ranks; returns the intra-op threads of this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = train.threads or max(1, cores // world.local_size)
    torch.set_num_threads(threads)
    return threads


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc keep what this process frees, on CPU ranks; returns whether it does.

    By default it hands large blocks back to the kernel, and every step of training faults the same activations in
    again, page by page. Settings that the user made (``MALLOC_*_``, ``GLIBC_TUNABLES``) or another allocator stay.
    """
    chosen = [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]
    if device.type != "cpu" or chosen or "LD_PRELOAD" in os.environ or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    largest_allowed = 32 << 20
    settings = ((mmap_threshold, largest_allowed), (trim_threshold, 1 << 30), (top_pad, 64 << 20))
    accepted = [mallopt(name, value) for name, value in settings]
    return all(accepted)


def most_restarts(world: World, group: dist.ProcessGroup | None = None) -> int:
    """How often torchrun has started the ranks anew: the most that any machine counts. Collective.

    A machine whose ranks end because those of another one failed starts them anew without counting it.
    """
    counted = [world.restarts] * dist.get_world_size(group)
    dist.all_gather_object(counted, world.restarts, group=group)
    return max(counted)


def require_one_device_type(store: Store, rank: int, size: int, device: torch.device) -> None:
    """Go on only if the devices of all ranks are of one type. Every rank calls it, before any process group.

    Some would otherwise wait for one another in NCCL and others in gloo. The first rank compares, the others hear it.

    Args:
        store: with no keys, that all ranks share; its timeout is how long they wait for one another.
        rank: of this process.
        size: how many ranks there are.
        device: this rank's.

    Raises:
        RefusedByAllError: they are not; on every rank alike.
    """
    store.set(f"device/{rank}", f"{device.type} on {socket.gethostname()}")
    if rank == 0:
        names = [f"device/{other}" for other in range(size)]
        store.wait(names)
        store.set("verdict", f"verdict: {_device_disagreement([told.decode() for told in store.multi_get(names)])}")
    said = store.get("verdict").decode().removeprefix("verdict: ")
    if not said:
        return
    store.set(f"heard/{rank}", "yes")
    if rank == 0:  # which may hold the store for all
        with suppress(dist.DistError):
            store.wait([f"heard/{other}" for other in range(size)], timedelta(seconds=10))
        forget_device_types(store, size)
    raise RefusedByAllError(said)


def forget_device_types(store: Store, size: int) -> None:
    """Remove what ``require_one_device_type`` wrote: torchrun keeps a store for the ranks that it starts anew."""
    for name in ("verdict", *(f"{kind}/{rank}" for kind in ("device", "heard") for rank in range(size))):
        store.delete_key(name)


def _device_disagreement(told: Sequence[str]) -> str:
    """The sentence that refuses, or nothing. ``told`` are texts like ``"cuda on host"``, in rank order."""
    others = [rank for rank, text in enumerate(told) if text.split()[0] != told[0].split()[0]]
    if not others:
        return ""
    return (
        f"all {len(told)} ranks must compute on devices of one type, but {len(others)} of them differ from rank 0, "
        f"{told[0]}, the first of these being rank {others[0]}, {told[others[0]]}; see that every machine has its GPUs "
        "and a torch that sees them (moetrain doctor), or set train.device to 'cpu'"
    )


@contextmanager
def _plain_network_errors(world: World, timeout_s: float) -> Iterator[None]:
    """Say what it means that ranks do not find one another."""
    try:
        yield
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise RendezvousError(
                f"rank 0 cannot wait for the others at {place}, as another program uses that port; choose another "
                "MASTER_PORT (torchrun: --master-port), or let torchrun --standalone take a free one"
            ) from error
        raise RendezvousError(
            f"rank {world.rank} did not find the other {world.size - 1} rank(s) by way of {place} within "
            f"{timeout_s:g} s; see that MASTER_ADDR and MASTER_PORT are those of rank 0, that no other program listens "
            "there, and that every rank has started"
        ) from error


def _within(timeout_s: float, ask: Callable[[], _T]) -> _T:
    """What ``ask`` returns or raises, in a thread that is left alone after ``timeout_s``.

    torch's store waits without end for the answer of a program that listens at that port and is none of ours.

    Raises:
        dist.DistNetworkError: it took longer.
    """
    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="moetrain-rendezvous", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except TimeoutError as error:
        raise dist.DistNetworkError("no answer in time") from error


@contextmanager
def process_group(world: World, device: torch.device, timeout_s: float) -> Iterator[None]:
    """The default process group, NCCL on GPUs and gloo on CPUs.

    After an error in a world of several ranks the group is left as it is, unless all of them raise it together: tearing
    it down could wait for ranks that still compute, and the process is about to end anyway, which is what tells them.

    Raises:
        RefusedByAllError: ranks have devices of several types.
        RendezvousError: the port is in use, or some ranks did not come in time.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    device_id = device if device.type == "cuda" else None
    store: Store
    if world.launched:
        with _plain_network_errors(world, timeout_s):
            store, rank, size = _within(timeout_s, lambda: next(rendezvous("env://", timeout=timeout)))
            store.set_timeout(timeout)
            asked = PrefixStore("moetrain", store)
            _within(2 * timeout_s, lambda: require_one_device_type(asked, rank, size, device))
    else:
        store, rank, size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device_id)
    if world.launched and rank == 0:  # the others have their answers, or there would be no group
        forget_device_types(asked, size)
    try:
        yield
    except BaseException as error:
        if world.size == 1 or isinstance(error, RefusedByAllError):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
