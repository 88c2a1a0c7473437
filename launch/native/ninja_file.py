"""Writes what ninja builds: an object per source and one library, each made again when what it is made of changes."""

import importlib
import importlib.util
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Step:
    """A file made by one command from others. A compiler writes what it included into ``target``.d."""

    target: Path
    command: Sequence[str]
    sources: Sequence[Path]
    compiles: bool


def compile_step(compiler: Sequence[str], source: Path, folder: Path, flags: Sequence[str]) -> Step:
    """The object of a source, in ``folder`` under the source's own path."""
    place = source if source.is_relative_to(folder) else folder / source
    target = place.with_suffix(source.suffix + ".o")
    rule = f"{target}.d"
    # -MD names torch's headers too: another torch in the same place is another torch.
    command = [*compiler, "-c", str(source), "-o", str(target), "-MD", "-MF", rule, *flags]
    return Step(target, command, [source], compiles=True)


def ninja_text(records: Path, steps: Sequence[Step]) -> str:
    """The file's text. ``records`` is the folder of ninja's own records, which several files may share."""
    lines = [f"builddir = {_path(records)}"]
    for number, step in enumerate(steps):
        command = shlex.join(step.command).replace("$", "$$")
        lines += [f"rule r{number}", f"  command = {command}", f"  description = {step.target.name}"]
        if step.compiles:
            lines += [f"  depfile = {_path(step.target)}.d", "  deps = gcc"]
        lines.append(f"build {_path(step.target)}: r{number} {' '.join(map(_path, step.sources))}")
    return "\n".join(lines) + "\n"


def run_ninja(
    file: Path, records: Path, steps: Sequence[Step], *, jobs: int | None, quiet: bool, env: Mapping[str, str]
) -> None:
    """Make what is missing or out of date.

    Raises:
        ValueError: there is no ninja.
        subprocess.CalledProcessError: a command failed; what it said was printed.
    """
    ninja = find_ninja()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(ninja_text(records, steps))
    command = [ninja, "-f", str(file)]
    command += [f"-j{jobs}"] if jobs else []
    command += ["--quiet"] if quiet else []
    sys.stdout.flush()
    subprocess.run(command, check=True, env=env)


def find_ninja() -> str:
    """The program: of the package that this Python has, or on the path.

    Raises:
        ValueError: there is none.
    """
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        return str(Path(importlib.import_module("ninja").BIN_DIR) / "ninja")
    on_path = shutil.which("ninja")
    if on_path is None:
        raise ValueError("the extension is built by ninja, and there is none: pip install ninja")
    return on_path


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
