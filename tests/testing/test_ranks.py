"""The pool itself: results, exceptions, hangs and deaths."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from moetrain.testing import ranks as ranks_module
from moetrain.testing.rank import Place, serve
from moetrain.testing.ranks import RankPoolError, RankPools, RankTimeoutError, start_process

pytestmark = pytest.mark.dist


@dataclass(frozen=True)
class Seen:
    rank: int
    total: torch.Tensor


class OddError(Exception):
    def __init__(self, first: int, second: int) -> None:  # does not survive pickling
        super().__init__(f"{first} {second}")


def add_up(rank: int, scale: torch.Tensor) -> Seen:
    total = scale * (rank + 1)
    dist.all_reduce(total)
    return Seen(dist.get_rank(), total)


def pid(rank: int) -> int:
    return os.getpid()


def raise_on(rank: int, failing: tuple[int, ...], odd: bool) -> None:
    if rank in failing:
        if odd:
            raise OddError(rank, 7)
        raise ValueError(f"no good on {rank}")
    dist.barrier()  # the others wait for a rank that never comes


def hang_on(rank: int, hanging: int) -> None:
    if rank == hanging:
        time.sleep(30)


def miss_a_collective(rank: int, missing: int) -> None:
    """One rank has other things to do; the others wait for it in gloo."""
    dist.barrier()
    if rank == missing:
        time.sleep(30)
    total = torch.ones(1)
    dist.all_reduce(total)


def die_on(rank: int, dying: int) -> None:
    if rank == dying:
        os._exit(3)
    dist.barrier()


def origin(rank: int) -> tuple[int, int, bool]:
    """Where this process was forked from, how many threads that has, and whether torch's slow parts came with it."""
    warm = sys.modules.keys() >= SLOW_MODULES
    return os.getppid(), len(os.listdir(f"/proc/{os.getppid()}/task")), warm


SLOW_MODULES = {"torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "moetrain.train.engine"}


def hash_of(rank: int, text: str) -> int:
    return hash(text)


def warn(rank: int) -> None:
    warnings.warn("mind the gap", stacklevel=1)


def environment(rank: int) -> tuple[str, int]:
    return os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def test_every_rank_runs_with_a_group_and_returns_its_result() -> None:
    results = run_on_ranks(3, add_up, torch.tensor([1.0, 10.0]))
    assert [seen.rank for seen in results] == [0, 1, 2]
    for seen in results:
        assert isinstance(seen, Seen)
        assert seen.total.tolist() == [6.0, 60.0]


def test_workers_live_on_between_calls_and_have_one_thread() -> None:
    first = run_on_ranks(2, pid)
    assert len(set(first)) == 2
    assert run_on_ranks(2, pid) == first
    assert run_on_ranks(2, environment) == [("1", 1)] * 2


def test_a_world_of_one_works() -> None:
    (seen,) = run_on_ranks(1, add_up, torch.tensor(5))
    assert seen.total == 5


@pytest.mark.parametrize("failing", [(0, 1), (1,)])
def test_an_exception_keeps_its_type_and_names_the_rank(failing: tuple[int, ...]) -> None:
    before = run_on_ranks(2, pid)
    with pytest.raises(ValueError, match=r"no good on") as caught:
        run_on_ranks(2, raise_on, failing, False)
    rank = int(str(caught.value)[-1])
    assert rank in failing
    assert f"on rank {rank} of 2" in caught.value.__notes__[0]
    assert run_on_ranks(2, pid) == before, "ranks that all answered are kept"
    assert run_on_ranks(2, add_up, torch.tensor(1))[0].total == 3


def test_an_exception_that_cannot_travel_becomes_a_pool_error_with_its_traceback() -> None:
    with pytest.raises(RankPoolError, match=r"(?s)on rank \d of 2.*OddError: \d 7"):
        run_on_ranks(2, raise_on, (0, 1), True)


def test_a_hang_replaces_the_pool_and_says_where_it_stood() -> None:
    before = run_on_ranks(2, pid)
    with pytest.raises(RankTimeoutError, match=r"(?s)rank\(s\) 1 of 2 did not answer within 1 s.*hang_on") as caught:
        run_on_ranks(2, hang_on, 1, timeout=1.0)
    assert "rank 0 had finished" in str(caught.value)
    assert not set(before) & set(run_on_ranks(2, pid))


def test_a_collective_that_one_rank_misses_names_every_rank_s_place() -> None:
    with pytest.raises(RankPoolError, match=r"rank\(s\) 0, 1, 2 of 3 did not answer within 2 s") as caught:
        run_on_ranks(3, miss_a_collective, 1, timeout=2.0)
    _, *stood = re.split(r"--- rank \d stood at:", str(caught.value))
    assert ["in all_reduce\n" in place for place in stood] == [True, False, True]
    assert all("in miss_a_collective\n" in place for place in stood)


def test_a_death_replaces_the_pool() -> None:
    with pytest.raises(RankPoolError, match=r"rank\(s\) 0 of 2 died \(exit code 3\)"):
        run_on_ranks(2, die_on, 0)
    assert run_on_ranks(2, add_up, torch.tensor(1))[1].total == 3


def test_a_local_function_is_refused() -> None:
    with pytest.raises(ValueError, match="<lambda>: it must be at the top level of a module"):
        run_on_ranks(2, lambda rank: rank)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ranks are spawned")
def test_ranks_are_forked_from_one_warmed_process_with_one_thread() -> None:
    """A thread of it would be missing in a fork, with whatever it held locked."""
    origins = {*run_on_ranks(2, origin), *run_on_ranks(3, origin)}
    assert len(origins) == 1
    ((parent, num_threads, warm),) = origins
    assert parent != os.getpid()
    assert num_threads == 1
    assert warm


def test_spawned_ranks_have_hashes_of_their_own() -> None:
    """So what is ordered by a set of names differs between them, as it does between machines."""
    with RankPools(start="spawn") as pools:
        assert pools.run(2, add_up, torch.tensor(1))[1].total == 3
        if "PYTHONHASHSEED" not in os.environ:
            assert len(set(pools.run(2, hash_of, "a name"))) == 2


def test_a_warning_is_an_error_where_it_is_asked_for() -> None:
    with pytest.raises(UserWarning, match="mind the gap"):
        run_on_ranks(1, warn)
    with RankPools() as pools:
        assert pools.run(1, warn) == [None]


def test_ranks_that_do_not_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "START_TIMEOUT_S", 0.0)
    with (
        RankPools() as pools,
        pytest.raises(RankTimeoutError, match=r"did not answer within 0 s in (start-up|preparing)"),
    ):
        pools.run(1, pid)


def test_no_more_processes_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pools used longest ago make room."""
    monkeypatch.setattr(ranks_module, "MOST_PROCESSES", 5)
    with RankPools() as pools:
        one, two = pools.run(1, pid), pools.run(2, pid)
        assert pools.run(1, pid) == one
        pools.run(3, pid)  # the two make room, the one need not
        assert pools.run(1, pid) == one
        assert not {*pools.run(2, pid)} & {*two}


def test_pools_end_with_their_processes_and_folder() -> None:
    with RankPools() as pools:
        folder = pools.folder
        pids = pools.run(2, pid)
        assert folder.is_dir()
    assert not folder.exists()
    assert not any(os.path.exists(f"/proc/{number}") for number in pids)


@pytest.mark.parametrize(("folder", "is_ready"), [("", False), ("", True), ("gone", False)])
def test_a_rank_whose_asker_is_gone_ends_without_a_traceback(folder: str, is_ready: bool, tmp_path: Path) -> None:
    """The pipe is closed before the rank writes to it, or with what it wrote unread, or its folder is gone."""
    ours, theirs = multiprocessing.Pipe()
    process = start_process(serve, Place(0, 1, tmp_path / folder / "trace", False), theirs)
    theirs.close()
    if is_ready:
        assert ours.poll(60.0)
    ours.close()
    process.join(60.0)
    assert process.exitcode == 0


def test_verify_is_ended_by_sigterm_in_one_sentence() -> None:
    """A real signal to a real process, while its ranks start; they end with it, and say nothing."""
    program = (
        "import sys, time; from moetrain.verify import compare; from moetrain.cli.main import main\n"
        "def slow(spec):\n"
        "    print('computing', flush=True); time.sleep(60)\n"
        "compare.expect = slow\n"
        "sys.exit(main(['verify', '--ranks', '2', '--mesh', 'dp=2']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "computing\n"
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)  # until the last that has the pipe, a rank too, is gone
        finally:
            process.kill()
    assert (process.returncode, err) == (143, "moetrain: verify was ended by SIGTERM\n")
