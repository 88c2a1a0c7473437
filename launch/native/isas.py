"""Which instruction sets the CPU kernels of expert_mlp and causal_attention are compiled for.

``MOETRAIN_BUILD_ISA`` is ``native`` (what the machine at hand runs best, and the portable kernels), ``all``, or a list
such as ``avx2,portable``. Each name has one file, ``csrc/cpu/isa/isa_NAME.cpp``; the kernels' own choice at run time
finds out which of them were compiled.
"""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

VARIABLE = "MOETRAIN_BUILD_ISA"
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated")
# AMX and AVX512_BF16 multiply bf16 alone, so other dtypes run on AVX-512; where nothing else fits, portable runs.
NEEDS = {"amx": ("avx512", "portable"), "avx512_bf16": ("avx512", "portable")}

# How csrc/common/clones.h calls those that it compiles whole functions for; "default" is the portable one.
CLONES = {"avx512": "arch=x86-64-v4", "avx2": "arch=x86-64-v3"}


def clone_flags(built: Sequence[str]) -> list[str]:
    """The flag by which functions with clones get those of the instruction sets in ``built`` alone.

    At least one is kept beside the portable one, since the compiler takes no fewer than two.
    """
    kept = [name for isa, name in CLONES.items() if isa in built] or list(CLONES.values())
    return ["-DMOETRAIN_CLONES_FOR=" + ",".join(f'"{name}"' for name in (*kept, "default"))]


def isas_to_build(wanted: str, isas_of_machine: Callable[[], list[str]]) -> list[str]:
    """Names to compile, best first, from what the variable holds.

    Args:
        wanted: ``native`` or nothing, ``all``, or names separated by commas.
        isas_of_machine: finds what the machine at hand can run, best first; called for ``native`` alone.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()] or ["native"]
    unknown = [name for name in names if name not in (*ISAS, "all", "native")]
    if unknown or (len(names) > 1 and not {"all", "native"}.isdisjoint(names)):
        raise ValueError(
            f"{VARIABLE} must be native, all or a list of {', '.join(ISAS)} separated by commas, got {wanted!r}"
        )
    if names == ["all"]:
        return list(ISAS)
    if names == ["native"]:
        names = [isas_of_machine()[0]]
    chosen = {*names, "portable"}.union(*(NEEDS.get(name, ()) for name in names))
    return [isa for isa in ISAS if isa in chosen]


def find_isas_of_machine(csrc: Path, compiler: Sequence[str], folder: Path) -> list[str]:
    """Names that this machine can run, best first, found by the code that chooses among them at run time.

    Args:
        csrc: that code's folder.
        compiler: first words of a command.
        folder: where the program that finds them is kept, for the next time.
    """
    program, source = folder / "print_isas", Path(__file__).with_name("print_isas.cpp")
    parts = [source, csrc / "cpu/isa/machine.h"]
    if not program.exists() or program.stat().st_mtime < max(part.stat().st_mtime for part in parts):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([*compiler, "-std=c++20", "-O0", f"-I{csrc}", str(source), "-o", str(program)])
    return subprocess.check_output([program.resolve()], text=True).split()
