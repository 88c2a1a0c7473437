"""The sources ask for any torch that they are tried with, a build for the one that it was built with."""

import email
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from email.message import Message
from pathlib import Path

import pytest
from setuptools import build_meta

import moetrain
from launch.native import requirements as module
from launch.native.requirements import BUILDS, OTHERS, TORCH, requirements

ROOT = Path(__file__).parents[3]
MINOR = ".".join(importlib.metadata.version("torch").split(".")[:2])
# What a source distribution must hold beside its metadata; everything in these folders that git knows.
FOLDERS = ("csrc", "launch/native", "moetrain")
FILES = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
JUNK = (
    "csrc/cpu/old.o",
    "csrc/notes.txt",
    "launch/native/__pycache__/old.pyc",
    "moetrain/_C.abi3.so",
    "moetrain/.coverage",
    "tests/test_it.py",
    "runs/a/metrics.jsonl",
)
METADATA = {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a clone has them, and what else lies about after some work."""
    clone = tmp_path_factory.mktemp("clone")
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / folder, clone / folder, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, clone)
    return clone


def setup(clone: Path, *words: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", *words]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def asked(metadata: Message) -> list[str]:
    return [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]


def test_a_source_distribution_holds_what_builds_and_no_junk(clone: Path, tmp_path: Path) -> None:
    expected = {str(path.relative_to(clone)) for path in clone.rglob("*") if path.is_file()}
    assert len(expected) > 300
    for name in JUNK:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("junk\n")
    setup(clone, "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        text = archive.extractfile(f"{file.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert text is not None
        metadata = email.message_from_binary_file(text)
    for name in JUNK:
        (clone / name).unlink()
    assert {name for name in names - METADATA if ".egg-info/" not in name} == expected
    assert asked(metadata) == [TORCH, *OTHERS]
    assert "requires-dist" in (metadata.get_all("Dynamic") or []), "a wheel may then ask for something else"


def test_a_build_asks_for_its_torch(clone: Path, tmp_path: Path) -> None:
    setup(clone, "dist_info", "--output-dir", str(tmp_path))
    (file,) = tmp_path.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(file.read_text())
    assert asked(metadata) == [f"torch=={MINOR}.*", *OTHERS]
    assert metadata["Version"] == moetrain.__version__


def test_the_commands_of_a_build_are_those_of_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What setuptools calls setup.py with for a wheel, its metadata, and an editable install."""
    called: list[list[str]] = []
    monkeypatch.setattr(build_meta._BuildMetaBackend, "run_setup", lambda self: called.append(sys.argv[1:]))
    for name in ("build_wheel", "build_editable", "prepare_metadata_for_build_wheel", "build_sdist"):
        with pytest.raises((ValueError, AssertionError, OSError)):
            getattr(build_meta, name)(str(tmp_path))
    assert called
    assert [not set(words).isdisjoint(BUILDS) for words in called] == [True, True, True, False]


def test_without_torch_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ValueError

    monkeypatch.setattr(module, "find_torch", none)
    assert requirements(["bdist_wheel"]) == [TORCH, *OTHERS]
