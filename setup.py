"""Builds the extension: the CPU part always, the CUDA part when torch and the machine both have CUDA."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths
except ImportError:
    sys.exit(
        "moetrain builds against the torch it will run with: install torch, then pip install --no-build-isolation ."
    )

csrc = Path("csrc")
sanitize = os.environ.get("MOETRAIN_SANITIZE") == "1"  # see launch/sanitize.sh
with_cuda = torch.version.cuda is not None and CUDA_HOME is not None and not sanitize
sources = [csrc / "bindings.cpp", *csrc.glob("ops/*_cpu.cpp"), *csrc.glob("cpu/**/*.cpp")]
if with_cuda:
    sources += [*csrc.glob("ops/*_cuda.cpp"), *csrc.glob("cuda/*.cu")]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")

# Compiled for OpenMP but not linked to it: the symbols are then those of torch's own OpenMP runtime, so that
# torch.set_num_threads rules our loops too. Linking would bring in a second runtime with its own threads.
# Torch's folders are named again as system folders, to hear warnings about our own code alone.
host_flags = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-fopenmp"]
host_flags += [flag for folder in include_paths() for flag in ("-isystem", folder)]
sanitizers: list[str] = []
if sanitize:
    sources.append(Path("tests/sanitizer/canary.cpp"))
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    # Python's own flags have -fwrapv, under which no overflow is undefined.
    host_flags += [*sanitizers, "-fno-wrapv", "-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
extension = CUDAExtension if with_cuda else CppExtension
setup(
    ext_modules=[
        extension(
            "moetrain._C",
            sorted(map(str, sources)),
            include_dirs=[str(csrc.resolve())],
            depends=sorted(map(str, csrc.rglob("*.h"))),
            define_macros=[("MOETRAIN_WITH_CUDA", None)] if with_cuda else [],
            extra_link_args=sanitizers,
            extra_compile_args={
                "cxx": host_flags,
                "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"],
            },
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
