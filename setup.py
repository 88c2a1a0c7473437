"""Builds the extension: the CPU part always, the CUDA part when torch and the machine both have CUDA."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    sources += [*csrc.glob("ops/*_cuda.cpp"), *(p for p in csrc.glob("cuda/**/*.cu") if not p.stem.endswith("_sm90"))]
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
nvcc_flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]


class BuildWithHopper(BuildExtension):
    """Also compiles the kernels of Hopper, which no other architecture can run: ``*_sm90.cu``, for sm_90a alone."""

    def build_extensions(self) -> None:
        kernels = sorted(csrc.glob("cuda/**/*_sm90.cu")) if with_cuda else []
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as workers:
            self.extensions[0].extra_objects += map(str, workers.map(self.compile_for_hopper, kernels))
        super().build_extensions()

    def compile_for_hopper(self, source: Path) -> Path:
        """The object file, made anew where the source or any header is newer."""
        target_file = Path(self.build_temp, source).with_suffix(".o")
        target_file.parent.mkdir(parents=True, exist_ok=True)
        newest = max(path.stat().st_mtime for path in [source, *csrc.rglob("*.h"), *csrc.rglob("*.cuh")])
        if not target_file.exists() or target_file.stat().st_mtime < newest:
            nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
            target = ["-gencode", "arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC", f"-I{csrc}"]
            subprocess.check_call([nvcc, "-c", str(source), "-o", str(target_file), *nvcc_flags, *target])
        return target_file


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
                "nvcc": nvcc_flags,
            },
        )
    ],
    cmdclass={"build_ext": BuildWithHopper},
)
