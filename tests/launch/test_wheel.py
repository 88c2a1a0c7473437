"""The script that makes a wheel and tries it: its options, what it refuses, and, where there is time, all of it."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "wheel.sh"
LOOKS_BELOW = re.compile(r"csrc|g\+\+|subprocess|\bROOT\b|cuda_tools|emulated_kernels|emulated_operators")


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def shell(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Code that uses the functions of wheel_try.sh, with ``tried`` naming a folder that has tools."""
    (folder / "tools").mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    for name in ("bash", "rm"):
        (folder / "tools" / name).symlink_to(str(shutil.which(name)))
    start = "set -euo pipefail; source launch/setup.sh; source launch/wheel_try.sh; given=(GIVEN=1); "
    command = ["bash", "-c", f"{start} tried='{folder}'; {code}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def values_of(name: str) -> list[str]:
    found = re.search(rf"^{name}=\(([^)]*)\)", (ROOT / "launch" / "wheel_try.sh").read_text(), re.MULTILINE)
    assert found is not None
    return found.group(1).split()


def test_help_names_every_option() -> None:
    done = run("--help")
    assert done.returncode == 0
    known = set(re.findall(r"(--[a-z-]+)\)", SCRIPT.read_text())) | {"--out", "--no-try", "--help"}
    assert all(f"  {option}" in done.stdout for option in known)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--fast"], "unknown option '--fast'"),
        (["--out"], "--out needs a value"),
        (["--out="], "--out needs a value"),
        (["--try", "a.tar.gz"], "--try must name a wheel, a file that ends in .whl, got '/tmp/a.tar.gz'"),
        (["--try=a.whl"], "--try: there is no file /tmp/a.whl"),
        (["--try", "WHEEL", "--out", "x"], "--try makes no wheel, so --out and --no-try have no place beside it"),
        (["--no-try", "--try", "WHEEL"], "--try makes no wheel"),
    ],
)
def test_wrong_options_are_told_before_anything_is_done(words: list[str], text: str, tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.touch()
    done = run(*[word.replace("WHEEL", str(wheel)) for word in words], cwd=Path("/tmp"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"moetrain: {text}")
    assert done.stderr.endswith("; see bash launch/wheel.sh --help.\n")


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--out", f"{tmp_path}/file/below")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"moetrain: cannot write to {tmp_path}/file/below; name another folder with --out.\n"


def test_what_is_left_untried_is_what_needs_a_compiler_or_sources() -> None:
    files = {path for path in (ROOT / "tests" / "ops").glob("*.py") if LOOKS_BELOW.search(path.read_text())}
    assert {str(path.relative_to(ROOT)) for path in files} == set(values_of("UNTRIED"))
    assert {"c++", "g++", "gcc", "cc", "clang", "ninja", "nvcc"} <= set(values_of("COMPILERS"))


def test_a_compiler_on_the_path_ends_the_try(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cc").symlink_to(str(shutil.which("true")))
    done = shell("check_surroundings", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "moetrain: the wheel must be tried without a compiler, and cc is on the path of the try.\n"


def test_a_try_that_can_read_the_clone_ends(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    done = shell("check_surroundings", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "moetrain: the try must not be able to read the clone, and can.\n"


def test_a_step_sees_nothing_of_the_caller_and_fails_with_its_reason(tmp_path: Path) -> None:
    code = """step one bash -c 'echo "$GIVEN${PYTHONPATH:-}$PWD"'; step two bash -c 'echo because; exit 3'"""
    done = shell(f"export PYTHONPATH=/somewhere; {code}", tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == ["moetrain: trying the wheel: one", f"1{tmp_path}"]
    assert done.stderr == "because\nmoetrain: the wheel failed: two (above).\n"


def test_a_step_that_read_from_the_clone_fails_though_it_ended_well(tmp_path: Path) -> None:
    done = shell("step one bash -c 'echo /clone/moetrain/_C.abi3.so >\"$REFUSALS\"'", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "moetrain: while one, this was read from the clone: /clone/moetrain/_C.abi3.so.\n"


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("open('clone/data.txt')", "data.txt"),
        ("sys.path.insert(0, 'clone'); import module", "module."),
        ("from importlib.machinery import ExtensionFileLoader as L; import importlib.util as u\n"
         "u.module_from_spec(u.spec_from_file_location('_C', 'clone/_C.so', loader=L('_C', 'clone/_C.so')))", "_C.so"),
        ("open('clone2/data.txt')", None),
    ],
)  # fmt: skip
def test_a_refused_folder_is_not_read(code: str, seen: str | None, tmp_path: Path) -> None:
    for name in ("clone/data.txt", "clone/module.py", "clone/_C.so", "clone2/data.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    refusals = tmp_path / "refused"
    env = {**os.environ, "REFUSED_FOLDER": str(tmp_path / "clone"), "REFUSALS": str(refusals)}
    env |= {"PYTHONPATH": str(ROOT / "launch"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", f"import sys, refuse_folder; refuse_folder.install()\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == (seen is None), done.stderr
    if seen is not None:
        assert "of which nothing may be read here" in done.stderr
        refused = Path(refusals.read_text().splitlines()[0])
        assert refused.is_relative_to(tmp_path / "clone")
        assert refused.name.startswith(seen)
    env.pop("REFUSALS")
    command[-1] = "import refuse_folder; refuse_folder.install(); open('clone/data.txt')"
    subprocess.run(command, cwd=tmp_path, env=env, timeout=60, check=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_wheel_is_made_and_works(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"moetrain-[\d.]+-cp311-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert done.stdout.endswith(f"moetrain: the wheel works: {wheel.name}\n")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        asked = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist") or []
        library = archive.read("moetrain/_C.abi3.so")
    assert [name for name in names if ".so" in name] == ["moetrain/_C.abi3.so"], "torch's libraries stay with torch"
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"torch=={minor}.*" in asked
    assert b"$ORIGIN/../torch/lib" in library
    assert not any(name.startswith(("tests/", "launch/", "csrc/")) for name in names)
    assert (tmp_path / f"moetrain-{wheel.name.split('-')[1]}.tar.gz").is_file()
