"""Compiles what needs no torch, the kernels of expert_mlp and causal_attention: they take a third of a build.

    python -m launch.native.kernels    from the root of the project, while torch is still being installed

setup.py finds the objects there, and compiles what is missing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.native import compilers, isas
from launch.native.ninja_file import Step, compile_step, run_ninja

ROOT = Path(__file__).parents[2]
CSRC = Path("csrc")  # paths are from ROOT, so that other clones' commands are the same
BUILD = Path("build")


def kernel_steps(folder: Path, compiler: Sequence[str], built: Sequence[str], *, sanitize: bool) -> list[Step]:
    """One object per instruction set, in ``folder``/kernels. No flag has to do with torch."""
    steps = []
    for isa in built:
        speed = compilers.FOR_ALL_ELSE if isa == "portable" else compilers.FOR_SPEED
        flags = [*speed, *compilers.own_flags(sanitize=sanitize), f"-I{CSRC}"]
        steps.append(compile_step(compiler, CSRC / f"cpu/isa/isa_{isa}.cpp", folder / "kernels", flags))
    return steps


def built_isas(folder: Path, compiler: Sequence[str]) -> list[str]:
    """What ``MOETRAIN_BUILD_ISA`` asks for."""
    wanted = os.environ.get(isas.VARIABLE, "")
    return isas.isas_to_build(wanted, lambda: isas.find_isas_of_machine(CSRC, compiler, folder))


def main() -> int:
    """Compile them; returns the exit code."""
    os.chdir(ROOT)
    compiler = compilers.host_compiler()
    steps = kernel_steps(BUILD, compiler, built_isas(BUILD, compiler), sanitize=False)
    env = {**os.environ, **compilers.cache_environment(ROOT)}
    run_ninja(BUILD / "kernels.ninja", BUILD, steps, jobs=compilers.jobs(), quiet=True, env=env)
    return 0


if __name__ == "__main__":
    sys.exit(main())
