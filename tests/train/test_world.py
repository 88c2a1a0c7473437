import os
import platform
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moetrain.config import TrainConfig
from moetrain.train.world import (
    RefusedByAllError,
    RendezvousError,
    World,
    forget_device_types,
    keep_freed_memory,
    process_group,
    require_one_device_type,
    set_threads,
)

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_world_of_its_own() -> None:
    assert World.from_environment() == World(rank=0, size=1, local_rank=0, local_size=1, launched=False)


def test_what_torchrun_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("5", "8", "1", "4", "10.0.0.1", "29500", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 4, launched=True, restarts=2)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"lacks MASTER_ADDR, MASTER_PORT; start with torchrun"):
        World.from_environment()


@pytest.mark.parametrize(
    ("name", "text", "legal"),
    [
        ("RANK", "x", "from 0 to 7"),
        ("RANK", "8", "from 0 to 7"),
        ("RANK", "-1", "from 0 to 7"),
        ("WORLD_SIZE", "0", "at least 1"),
        ("WORLD_SIZE", "", "at least 1"),
        ("LOCAL_RANK", "4", "from 0 to 3"),
        ("LOCAL_WORLD_SIZE", "1.5", "at least 1"),
        ("MASTER_PORT", "abc", "from 0 to 65535"),
        ("MASTER_PORT", "99999999", "from 0 to 65535"),
        ("TORCHELASTIC_RESTART_COUNT", "once", "at least 0"),
    ],
)
def test_what_a_launcher_sets_must_be_numbers(
    name: str, text: str, legal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known, value in zip(NAMES, ("5", "8", "1", "4", "10.0.0.1", "29500", "2"), strict=True):
        monkeypatch.setenv(known, value)
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=rf"variable {name} must be a whole number {legal}, got '{text}'; start with"):
        World.from_environment()


def launched(port: int, size: int, monkeypatch: pytest.MonkeyPatch) -> World:
    """The first of ``size`` ranks on this machine."""
    for name, value in zip(NAMES[:6], ("0", str(size), "0", str(size), "127.0.0.1", str(port)), strict=True):
        monkeypatch.setenv(name, value)
    return World.from_environment()


def test_a_port_in_use_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        world = launched(port, 1, monkeypatch)
        with (
            pytest.raises(RendezvousError, match=rf"at 127.0.0.1:{port}, as another program uses that port; choose an"),
            process_group(world, torch.device("cpu"), 5.0),
        ):
            pytest.fail("it listens")
    assert not dist.is_initialized()


def test_ranks_that_do_not_come_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    world = launched(port, 2, monkeypatch)
    with (
        pytest.raises(
            RendezvousError, match=r"rank 0 did not find the other 1 rank\(s\) .* within 1 s; see that MASTER"
        ),
        process_group(world, torch.device("cpu"), 1.0),
    ):
        pytest.fail("nobody came")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_another_program_at_the_port_is_one_sentence(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes connections and answers nothing: to the other ranks it looks like a first one that is slow."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        launched(port, 2, monkeypatch)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        world = World.from_environment()
        begun = time.monotonic()
        text = (
            "another program uses that port" if rank == "0" else r"rank 1 did not find .* within 1 s; .*no other prog"
        )
        with pytest.raises(RendezvousError, match=text), process_group(world, torch.device("cpu"), 1.0):
            pytest.fail("nobody answered")
        assert time.monotonic() - begun < 20.0
    assert not dist.is_initialized()


@pytest.mark.parametrize("lacking", [["LOCAL_RANK"], ["LOCAL_WORLD_SIZE"], ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]])
def test_several_ranks_must_know_their_place_on_their_machine(
    lacking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under srun or mpirun: else two nodes of 8 GPUs would look like one node of 16 ranks and 8 GPUs."""
    for name, value in zip(NAMES[:6], ("9", "16", "1", "8", "10.0.0.1", "29500"), strict=True):
        if name not in lacking:
            monkeypatch.setenv(name, value)
    text = rf"each of the 16 ranks must set .*, but lacks {', '.join(lacking)}; start with torchrun, or export .*srun"
    with pytest.raises(ValueError, match=text):
        World.from_environment()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(0, 1, 0, 1, launched=True)


@pytest.mark.parametrize(("error", "remains"), [(ValueError("one"), True), (RefusedByAllError("all"), False)])
def test_the_process_group_goes_where_all_ranks_refuse(error: ValueError, remains: bool) -> None:
    """Of one rank's error the others learn by its end; what all raise is told by the first alone, without groups."""
    one_of_two = World(size=2, local_size=2)
    with pytest.raises(ValueError, match=str(error)), process_group(one_of_two, torch.device("cpu"), 10.0):
        raise error
    assert dist.is_initialized() == remains
    if remains:
        dist.destroy_process_group()


def test_a_gpu_each_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert World().device("auto") == torch.device("cuda", 0)
    assert World().device("cpu") == torch.device("cpu")
    two = World(rank=1, size=2, local_rank=1, local_size=2)
    assert two.device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert two.device("auto") == two.device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert two.device("auto") == torch.device("cpu")
    with pytest.raises(
        ValueError, match=r"of the 2 ranks of this machine, but this one sees 0; set train.device to 'c"
    ):
        two.device("cuda")


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_too_few_gpus_are_refused_and_not_left_unused(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where srun binds one GPU to each task: every rank sees one of the machine's eight."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    text = (
        rf"train.device = '{choice}' needs a GPU for each of the 8 ranks of this machine, but this one sees 1; let "
        r"every rank see all GPUs of its machine \(with Slurm: --gpus-per-node and --gpu-bind=none\), or start 1 "
        r"rank\(s\) on it, or set train.device to 'cpu'"
    )
    with pytest.raises(ValueError, match=text):
        World(rank=9, size=16, local_rank=1, local_size=8).device(choice)


def ask(held: dist.TCPStore, device_types: list[str]) -> list[str]:
    """What every rank is told, each in a thread with a store's client of its own: nothing where it goes on."""

    def told(rank: int) -> str:
        store = dist.TCPStore("127.0.0.1", held.port, is_master=False, timeout=timedelta(seconds=30))
        try:
            require_one_device_type(store, rank, len(device_types), torch.device(device_types[rank]))
        except RefusedByAllError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(device_types)) as pool:
        return list(pool.map(told, range(len(device_types))))


def test_devices_of_several_types_are_refused_by_all_before_they_wait_for_one_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where one machine's driver is broken, and 'auto' takes its CPU."""
    monkeypatch.setattr("socket.gethostname", lambda: "host")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for same in (["cpu"], ["cuda", "cuda", "cuda"]):
        assert ask(store, same) == [""] * len(same)
        forget_device_types(store, len(same))
    before = store.num_keys()
    said = ask(store, ["cuda", "cuda", "cpu", "cpu"])
    assert store.num_keys() == before
    assert len(set(said)) == 1
    assert said[0].startswith(
        "all 4 ranks must compute on devices of one type, but 2 of them differ from rank 0, cuda on host, the first of "
        "these being rank 2, cpu on host; see that every machine has its GPUs"
    )
    assert ask(store, ["cpu"] * 4) == [""] * 4  # once mended, in the store that torchrun keeps


def test_the_process_group_asks_for_one_type_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, str]] = []

    def refuse(store: object, rank: int, size: int, device: torch.device) -> None:
        assert not dist.is_initialized()
        asked.append((rank, size, device.type))
        raise RefusedByAllError("several types")

    monkeypatch.setattr("moetrain.train.world.require_one_device_type", refuse)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in zip(NAMES, ("0", "1", "0", "1", "127.0.0.1", str(port), "0"), strict=True):
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    with pytest.raises(RefusedByAllError, match="several"), process_group(world, torch.device("cpu"), 10.0):
        pytest.fail("it went on")
    assert asked == [(0, 1, "cpu")]
    monkeypatch.undo()
    for name, value in zip(NAMES, ("0", "1", "0", "1", "127.0.0.1", str(port), "0"), strict=True):
        monkeypatch.setenv(name, value)
    forgotten: list[int] = []
    monkeypatch.setattr("moetrain.train.world.forget_device_types", lambda store, size: forgotten.append(size))
    with process_group(world, torch.device("cpu"), 10.0):
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        assert forgotten == [1]


def test_cores_are_shared_among_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert set_threads(TrainConfig(), World(size=2, local_size=2)) == 4
    assert set_threads(TrainConfig(), World(size=99, local_size=99)) == 1
    assert set_threads(TrainConfig(threads=3), World(size=2, local_size=2)) == 3
    assert chosen == [4, 1, 3]


FAULTS_OF_GROWING_BLOCKS = """
import resource, sys, torch
from moetrain.train.world import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory(torch.device("cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for mebibytes in range(4, 25):  # larger than any before, so that glibc by default maps each one afresh
    torch.ones(mebibytes << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(argument: str) -> int:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS_OF_GROWING_BLOCKS, argument]
    return int(subprocess.run(command, env=mine, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="glibc's allocator alone")
def test_freed_memory_is_kept() -> None:
    pages = sum(range(4, 25)) * 256
    assert _faults("keep") < pages / 4  # the largest one's
    assert _faults("default") > pages / 2


def test_the_allocator_is_left_alone_where_it_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not keep_freed_memory(torch.device("cuda"))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory(torch.device("cpu"))


def test_nodes_of_the_mesh_must_be_those_that_torchrun_started() -> None:
    World().check_nodes(8)
    World(size=4, local_size=4, launched=True).check_nodes(2)  # one machine may stand for several
    World(size=8, local_size=4, launched=True).check_nodes(4)
    with pytest.raises(ValueError, match=r"mesh.ranks_per_node \(8\) .* 4 of 8 run on this one; set .* to 4"):
        World(size=8, local_size=4, launched=True).check_nodes(8)
