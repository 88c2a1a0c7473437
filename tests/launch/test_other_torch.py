"""What test.sh --torch and --python refuse, name and keep apart; nothing is installed or compiled here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON_HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def run_test_sh(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch/test.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def in_shell(root: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script after what test.sh sources, as if the clone were ``root``."""
    sources = "".join(f"source {ROOT}/launch/{name}; " for name in ("setup.sh", "other_torch.sh"))
    command = ["bash", "-euo", "pipefail", "-c", f"{sources} MOETRAIN_ROOT={root}; kernels=; {script}"]
    hidden = ("MOETRAIN_PYTHON", "MOETRAIN_TORCH_VERSION", "PYTHONPATH", "PYTHONSAFEPATH")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**clean, **env})


@pytest.mark.parametrize("version", ["2.11", "v2.11.0", "2.11.0 ", "newest", "../2.11.0", "2.11.0+../x"])
def test_what_is_no_version_of_torch_is_refused_before_anything_is_made(version: str) -> None:
    done = run_test_sh("--torch", version)
    assert done.returncode == 2
    assert done.stderr == f"moetrain: --torch must be a whole version of torch, such as 2.11.0, got '{version}'.\n"
    assert done.stdout == ""


def test_a_value_that_is_missing_is_told() -> None:
    for option in ("--torch", "--python"):
        done = run_test_sh(option)
        assert (done.returncode, done.stderr) == (
            2,
            f"moetrain: {option} needs a value; see bash launch/test.sh --help.\n",
        )


def test_what_is_no_python_is_refused(tmp_path: Path) -> None:
    for path in ("/bin/false", str(tmp_path / "nothing")):
        done = run_test_sh(f"--python={path}")
        assert done.returncode == 2
        assert done.stderr == f"moetrain: --python must name a Python of 3.11 or newer, got '{path}'.\n"


@pytest.mark.parametrize("other", ["--lint", "--sanitize", "--cuda-build"])
def test_the_options_stand_for_the_tests_alone(other: str) -> None:
    done = run_test_sh(other, "--torch", "2.11.0")
    assert done.returncode == 2
    assert "--torch and --python run the tests alone" in done.stderr


@pytest.mark.parametrize(
    ("torch", "python", "name"),
    [
        ("2.11.0", "", "torch-2.11.0"),
        ("2.16.0.dev20261130", "", "torch-2.16.0.dev20261130"),
        ("2.15.0rc1", sys.executable, f"torch-2.15.0rc1-python-{PYTHON_HERE}"),
        ("2.15.0+cpu", "", "torch-2.15.0+cpu"),
        ("", sys.executable, f"torch-9.9.9-python-{PYTHON_HERE}"),
    ],
)
def test_each_torch_and_python_has_an_environment_and_a_build(
    tmp_path: Path, torch: str, python: str, name: str
) -> None:
    script = f'name_other_torch "{torch}" "{python}"; echo "$VENV $PY $OTHER_BUILT"'
    done = in_shell(tmp_path, script, MOETRAIN_TORCH_VERSION="9.9.9")
    venv = tmp_path / f".venv-{name}"
    assert done.stdout.split() == [str(venv), str(venv / "bin/python"), str(tmp_path / "build" / name)], done.stderr


def test_an_environment_with_another_torch_is_refused(tmp_path: Path) -> None:
    for version, said in (("2.13.0+cpu", ""), ("2.11.0", "must have torch 2.13.0, and has 2.11.0; remove the folder")):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\necho {version}\n")
        python.chmod(0o755)
        done = in_shell(tmp_path, f"VENV={tmp_path} PY={python} TORCH_VERSION=2.13.0; has_wanted_torch")
        assert (done.returncode, said in done.stderr) == (int(bool(said)), True)


STAND_IN = """#!/bin/sh
# A Python that builds at once, and imports what PYTHONPATH says.
if [ "$1" = setup.py ]; then
    while [ "$1" != --build-lib ]; do shift; done
    echo built >"$2/moetrain/_C.abi3.so"
fi
echo "$* PYTHONPATH=$PYTHONPATH PYTHONSAFEPATH=$PYTHONSAFEPATH" >>"$LOG"
"""


def test_the_build_leaves_the_extension_of_the_clone_alone(tmp_path: Path) -> None:
    package = tmp_path / "moetrain"
    (package / "ops" / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "ops/native.py", "ops/__pycache__/native.pyc", "_C.abi3.so"):
        (package / name).write_text(f"{name} of the clone")
    python, built = tmp_path / "venv" / "python", tmp_path / "build" / "torch-2.11.0"
    python.parent.mkdir()
    python.write_text(STAND_IN)
    python.chmod(0o755)
    stale = built / "moetrain" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    names = f"VENV={python.parent} PY={python} TORCH_VERSION=2.11.0 OTHER_BUILT={built}"
    done = in_shell(tmp_path, f"{names}; build_for_other_torch", LOG=str(tmp_path / "log"))
    assert done.returncode == 0, done.stderr
    assert (package / "_C.abi3.so").read_text() == "_C.abi3.so of the clone"
    assert (built / "moetrain" / "_C.abi3.so").read_text() == "built\n"
    files = {str(path.relative_to(built / "moetrain")) for path in (built / "moetrain").rglob("*") if path.is_file()}
    assert files == {"__init__.py", "ops/native.py", "_C.abi3.so"}
    assert (built / "moetrain/ops/native.py").readlink() == package / "ops/native.py"
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.endswith(f"PYTHONPATH={built}:{tmp_path}:{tmp_path}/tests:{tmp_path}/benchmarks PYTHONSAFEPATH=1")
