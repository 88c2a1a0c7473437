"""The C++ compiler, nvcc and a compiler cache: which ones, and the flags that this project compiles with."""

import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

CACHE_VARIABLE = "MOETRAIN_COMPILER_CACHE"
CACHES = ("ccache", "sccache")

# Compiled for OpenMP but not linked to it: the symbols are then those of torch's own OpenMP runtime, so that
# torch.set_num_threads rules our loops too. Linking would bring in a second runtime with its own threads.
# Python's own flags are left out: they ask for debugging information, a quarter of the time and most of the file.
# The kernels: what -O3 inlines and unrolls beyond the rest is worth 5 % of a step.
FOR_SPEED = ("-O3",)
# All else, portable kernels too: loops are vectorised and small ones unrolled as by -O3, in two thirds of its time.
FOR_ALL_ELSE = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fpeel-loops")
HOST_FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-DNDEBUG")
# Integers wrap round, as in all that Python's own flags compile; the sanitizers must see what overflows.
WRAPPING = ("-fwrapv",)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
SANITIZED = (*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS")

NVCC_FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC")
# Machine code for Ampere and Hopper; Ada and Blackwell compile the intermediate code of 8.0 when they first load it.
ARCHITECTURES = "8.0+PTX;9.0a"


def host_compiler() -> list[str]:
    """The C++ compiler as the first words of a command, behind a compiler cache where there is one."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]
    cache = compiler_cache(compiler)
    return [cache, *compiler] if cache else compiler


def compiler_cache(compiler: list[str]) -> str | None:
    """The cache to run before the compiler, or None: where there is none, none is wanted, or the compiler is one.

    ``MOETRAIN_COMPILER_CACHE`` names a program, or is ``none``.

    Raises:
        ValueError: the variable names a program that is not there.
    """
    wanted = os.environ.get(CACHE_VARIABLE, "")
    if wanted == "none" or any(Path(word).name in CACHES for word in compiler):
        return None
    if wanted:
        if not shutil.which(wanted):
            raise ValueError(f"{CACHE_VARIABLE} names {wanted}, which is not there; install it, or set it to none")
        return wanted
    behind = shutil.which(compiler[0])
    if behind and Path(behind).resolve().name in CACHES:  # /usr/lib/ccache/g++ is such a link
        return None
    return next((name for name in CACHES if shutil.which(name)), None)


def cache_environment(root: Path) -> Mapping[str, str]:
    """What makes a cache find what another clone, in another folder, has compiled; the user's own words come first."""
    ours = {"CCACHE_BASEDIR": str(root), "CCACHE_NOHASHDIR": "1"}
    return {name: value for name, value in ours.items() if name not in os.environ}


def nvcc_targets(kernel: Path) -> list[str]:
    """Nvcc's options for the architectures that a kernel is compiled for: Hopper's own run nowhere else."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(";", " ").split()
    flags = []
    for architecture in ["9.0a"] if kernel.stem.endswith("_sm90") else listed:
        number, _, ptx = architecture.replace(".", "").partition("+")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def own_flags(*, sanitize: bool) -> list[str]:
    """Flags of every C++ source but those for speed; the user's ``CPPFLAGS`` and ``CXXFLAGS`` come last."""
    users = [word for name in ("CPPFLAGS", "CXXFLAGS") for word in shlex.split(os.environ.get(name, ""))]
    return [*HOST_FLAGS, *(SANITIZED if sanitize else WRAPPING), *users]


def jobs() -> int | None:
    """How many compilers run at a time: ``MAX_JOBS``, or None for as many as ninja likes."""
    return int(os.environ.get("MAX_JOBS", "0")) or None
