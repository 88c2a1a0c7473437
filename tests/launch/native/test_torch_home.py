"""Which CUDA toolkit is found for a torch."""

from pathlib import Path

import pytest

from launch.native.torch_home import TorchHome, find_cuda_home


def toolkit(home: Path) -> Path:
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch(mode=0o755)
    return home


@pytest.fixture
def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TorchHome:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return TorchHome(tmp_path / "packages" / "torch", "2.99", "13.0")


def test_the_toolkit_of_nvcc_on_the_path(tmp_path: Path, torch: TorchHome, monkeypatch: pytest.MonkeyPatch) -> None:
    home = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("PATH", str(home / "bin"))
    assert find_cuda_home(torch) == home


def test_a_link_on_the_path_is_followed(tmp_path: Path, torch: TorchHome) -> None:
    home = toolkit(tmp_path / "cuda")
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert find_cuda_home(torch) == home


def test_a_script_on_the_path_is_not_taken_for_a_toolkit_where_there_is_one(
    tmp_path: Path, torch: TorchHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bin" / "nvcc"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    usual = toolkit(tmp_path / "usual")
    monkeypatch.setattr("launch.native.torch_home.USUAL_CUDA_HOME", usual)
    assert find_cuda_home(torch) == usual
    monkeypatch.setattr("launch.native.torch_home.USUAL_CUDA_HOME", tmp_path / "nothing")
    assert find_cuda_home(torch) == tmp_path  # told later, with what is missing there


def test_what_is_named_and_what_torch_brings_come_first(
    tmp_path: Path, torch: TorchHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "cuda") / "bin"))
    packaged = toolkit(tmp_path / "packages" / "nvidia" / "cu13")
    assert find_cuda_home(torch) == packaged
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert find_cuda_home(torch) == tmp_path / "named"
    assert find_cuda_home(TorchHome(torch.root, "2.99", None)) is None
