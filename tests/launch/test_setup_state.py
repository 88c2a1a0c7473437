"""By what setup.sh knows that nothing has to be installed or built."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import launch.setup_state
from launch.native.requirements import OTHERS
from launch.setup_state import MODULES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("csrc", "launch/native"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "launch/setup_state.py", "launch/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def ask(clone: Path, *words: str, **env: str) -> str:
    command = [sys.executable, str(clone / "launch" / "setup_state.py"), *words]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOETRAIN_BUILD_")}
    return subprocess.check_output(command, text=True, env={**clean, **env}, cwd=clone).strip()


@pytest.mark.parametrize(
    "changed", ["csrc/cpu/norm/rotate.cpp", "csrc/cpu/tiles/tiles.h", "launch/native/compilers.py", "setup.py"]
)
def test_a_changed_source_is_another_extension(clone: Path, changed: str) -> None:
    before = ask(clone, "extension")
    os.utime(clone / changed)
    assert ask(clone, "extension") == before, "it was read, not looked at"
    (clone / changed).write_text((clone / changed).read_text() + "\n")
    assert ask(clone, "extension") != before


def test_a_new_source_and_another_choice_are_another_extension(clone: Path) -> None:
    before = ask(clone, "extension")
    assert ask(clone, "extension", MOETRAIN_BUILD_ISA="all") != before
    assert ask(clone, "extension", MOETRAIN_BUILD_CUDA="0") != before
    (clone / "csrc" / "cpu" / "norm" / "new.cpp").write_text("")
    assert ask(clone, "extension") != before


def test_packages_are_known_by_what_is_asked_for_and_where(
    clone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = ask(clone, "packages", "")
    moved = tmp_path_factory.mktemp("moved") / "clone"
    shutil.copytree(clone, moved)
    assert ask(moved, "packages", "") != before, "an editable install names the folder"
    (clone / "launch" / "constraints.txt").write_text("mypy==0\n")
    assert ask(clone, "packages", "") != before


def test_a_missing_package_is_no_set_up(clone: Path) -> None:
    state = clone / "launch" / "setup_state.py"
    state.write_text(state.read_text().replace('"tyro"', '"no_such_module"'))
    assert importlib.util.find_spec("no_such_module") is None
    done = subprocess.run([sys.executable, str(state), "packages", ""], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "moetrain: missing: no_such_module\n")


def test_torch_is_the_only_requirement_that_is_left_out(clone: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ask(clone, "requirements", "dev").splitlines() == [*OTHERS, *project["optional-dependencies"]["dev"]]
    assert set(MODULES[""]) == {"torch", *OTHERS}


def test_an_importer_keeps_its_path() -> None:
    """Else what this clone has built would come before what PYTHONPATH names."""
    before = list(sys.path)
    importlib.reload(launch.setup_state)
    assert sys.path == before
