"""What setup.sh decides by: which packages are needed, and whether anything must be installed or built again.

    python launch/setup_state.py requirements EXTRAS    requirements of moetrain but torch, one a line
    python launch/setup_state.py packages EXTRAS        a hash of what decides what is installed; fails if some is not
    python launch/setup_state.py extension              a hash of what the native extension is made of

EXTRAS is "" or the names of extras, separated by commas. Nothing heavy is imported: every start asks.
"""

import hashlib
import importlib.util
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
if not __package__:  # a script; an importer keeps its path
    sys.path.insert(0, str(ROOT))
from launch.native.requirements import OTHERS  # noqa: E402
from launch.native.torch_home import find_torch  # noqa: E402

# What a set-up that ended well has left, by the name that Python imports.
MODULES = {"": ("numpy", "rich", "safetensors", "tyro", "torch"), "dev": ("pytest", "mypy", "hypothesis")}


def requirements(extras: str) -> str:
    """Lines for pip: dependencies and those of the extras; torch is chosen by setup.sh."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(OTHERS)
    for extra in filter(None, extras.split(",")):
        lines += project["optional-dependencies"][extra]
    return "\n".join(lines)


def packages(extras: str) -> str:
    """A hash of this Python, of what is asked of it, and of the place of the clone.

    Raises:
        LookupError: a package is missing.
    """
    modules = [name for extra in dict.fromkeys(["", *extras.split(",")]) for name in MODULES.get(extra, ())]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise LookupError(f"missing: {', '.join(missing)}")
    asked = [
        (ROOT / name).read_bytes()
        for name in ("pyproject.toml", "launch/native/requirements.py", "launch/constraints.txt")
    ]
    return _hash(sys.version.encode(), str(ROOT).encode(), extras.encode(), *asked)


def extension() -> str:
    """A hash of the sources, of what compiles them and of torch.

    Raises:
        ValueError: there is no torch.
    """
    torch = find_torch()
    made_of = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*"), *(ROOT / "launch/native").glob("*.*")]
    files = sorted(path for path in made_of if path.is_file())
    names = ("MOETRAIN_BUILD_ISA", "MOETRAIN_BUILD_CUDA", "CXX", "CXXFLAGS", "TORCH_CUDA_ARCH_LIST")
    asked = [os.environ.get(name, "") for name in names]
    parts = [torch.version, str(torch.cuda), *asked, *(str(path) for path in files)]
    return _hash(*(part.encode() for part in parts), *(path.read_bytes() for path in files))


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:" % len(part) + part)
    return digest.hexdigest()


def main(arguments: list[str]) -> int:
    """Print what was asked for; returns the exit code."""
    what: dict[str, Callable[..., str]] = {"requirements": requirements, "packages": packages, "extension": extension}
    try:
        print(what[arguments[0]](*arguments[1:]))
    except (LookupError, ValueError) as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
