"""An extension that was built with another torch is refused before it is loaded, with its cure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moetrain import _C, built_with
from moetrain.cli import doctor

MINOR = ".".join(torch.__version__.split(".")[:2])


def test_the_library_says_with_which_torch_it_was_built() -> None:
    library = built_with.library()
    assert library is not None
    assert library.samefile(str(_C.__file__))
    marks = {match.group() for match in built_with.MARK.finditer(library.read_bytes())}
    assert marks == {_C.built_with.encode()}
    assert _C.built_with.startswith(f"moetrain built with torch {MINOR}.")
    built_with.require_fit(library, torch.__version__)


@pytest.mark.parametrize(
    ("built", "found", "fits"),
    [
        ("2.13.0", "2.13.0+cpu", True),
        ("2.13.0", "2.13.1+cu130", True),
        ("2.15.0", "2.15.0.dev20260101", True),
        ("2.13.0", "2.14.0", False),
        ("2.13.0", "2.1.3", False),
        ("2.1.0", "2.13.0", False),
        ("2.13.0", "3.13.0", False),
    ],
)
def test_one_minor_version_fits(built: str, found: str, fits: bool, tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"\x7fELF\0moetrain built with torch " + built.encode() + b"\0rest")
    if fits:
        built_with.require_fit(library, found)
        return
    wanted = ".".join(built.split(".")[:2])
    says = f"built with torch {built}, and this environment has torch {found}: .*'torch=={wanted}.*', or build moetrain"
    with pytest.raises(ImportError, match=says.replace("+", r"\+")):
        built_with.require_fit(library, found)


def test_an_extension_without_a_mark_is_let_through(tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"\x7fELF")
    built_with.require_fit(library, "2.13.0")


def test_another_torch_ends_the_import_before_anything_is_loaded() -> None:
    code = "import torch; torch.__version__ = '2.99.0'; import sys\ntry: import moetrain.ops\n"
    code += "except ImportError as e: print('moetrain._C' in sys.modules, e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert re.match(
        rf"False moetrain's .* were built with torch {MINOR}\.\S+, and this .* has torch 2\.99\.0", done.stdout
    )


def test_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    (finding,) = doctor._extension()
    assert finding.ok is False
    assert f"built with torch {MINOR}" in finding.value
    assert finding.cure == built_with.BUILD
