import pytest
import torch

from moetrain.config import TrainConfig
from moetrain.train.world import World, set_threads

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


def test_a_gpu_each_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert World().device("auto") == torch.device("cuda", 0)
    assert World().device("cpu") == torch.device("cpu")
    two = World(rank=1, size=2, local_rank=1, local_size=2)
    assert two.device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"needs a GPU for each of the 2 local ranks, found 1; start 1 ranks"):
        two.device("cuda")


def test_cores_are_shared_among_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert set_threads(TrainConfig(), World(size=2, local_size=2)) == 4
    assert set_threads(TrainConfig(), World(size=99, local_size=99)) == 1
    assert set_threads(TrainConfig(threads=3), World(size=2, local_size=2)) == 3
    assert chosen == [4, 1, 3]
