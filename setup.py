"""Builds the extension: the CPU part always, the CUDA part when torch and the machine both have CUDA."""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit(
        "moetrain builds against the torch it will run with: install torch, then pip install --no-build-isolation ."
    )

# Where torch's own CUDA packages hold nvcc, no other CUDA will fit better. torch reads CUDA_HOME at this import.
packaged_cuda = Path(torch.__file__).parents[1] / "nvidia" / f"cu{(torch.version.cuda or '').partition('.')[0]}"
if (packaged_cuda / "bin" / "nvcc").is_file():
    os.environ.setdefault("CUDA_HOME", str(packaged_cuda))
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from build_tools import isas  # noqa: E402

csrc = Path("csrc")
sanitize = os.environ.get("MOETRAIN_SANITIZE") == "1"  # see launch/sanitize.sh
with_cuda = torch.version.cuda is not None and CUDA_HOME is not None and not sanitize
try:
    built_isas = isas.isas_to_build(os.environ.get(isas.VARIABLE, ""), lambda: isas.find_isas_of_machine(csrc))
except ValueError as error:
    sys.exit(f"moetrain: {error}")
left_out = {csrc / f"cpu/isa/isa_{isa}.cpp" for isa in isas.ISAS if isa not in built_isas}
sources = [csrc / "bindings.cpp", *csrc.glob("ops/**/*_cpu.cpp"), *{*csrc.glob("cpu/**/*.cpp")} - left_out]
sources += csrc.glob("ops/**/*_cuda.cpp") if with_cuda else []
kernels = sorted(csrc.glob("cuda/**/*.cu")) if with_cuda else []
# Machine code for Ampere and Hopper; Ada and Blackwell compile the intermediate code of 8.0 when they first load it.
architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a").replace(";", " ").split()

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
nvcc_flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler", "-fPIC"]


def targets_of(kernel: Path) -> list[str]:
    """nvcc's options for the architectures that a kernel is compiled for: Hopper's own run nowhere else."""
    flags = []
    for architecture in ["9.0a"] if kernel.stem.endswith("_sm90") else architectures:
        number, _, ptx = architecture.replace(".", "").partition("+")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if ptx:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def newest_of(rule: Path) -> float:
    """When the last of the files was changed that a Makefile's rule, as nvcc writes it, names."""
    files = [Path(word) for word in rule.read_text().replace("\\\n", " ").partition(" : ")[2].split()]
    return max(path.stat().st_mtime if path.exists() else float("inf") for path in files)


class BuildWithKernels(BuildExtension):
    """Compiles kernels with exactly the flags that the tests check, not with those that torch adds to its own."""

    def build_extensions(self) -> None:
        self.link_again_after_another_choice()
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as workers:
            self.extensions[0].extra_objects += map(str, workers.map(self.compile_kernel, kernels))
        if with_cuda:
            self.extensions[0].library_dirs += self.folders_with_cudart()
        super().build_extensions()

    def link_again_after_another_choice(self) -> None:
        """What setuptools takes for up to date was perhaps linked from other sources; objects are kept."""
        linked, chosen = Path(self.build_temp, "isas"), " ".join(built_isas)
        self.force = self.force or not linked.exists() or linked.read_text() != chosen
        linked.parent.mkdir(parents=True, exist_ok=True)
        linked.write_text(chosen)

    def compile_kernel(self, source: Path) -> Path:
        """The object file, made anew where the source, a header that it includes or the command has changed."""
        target = Path(self.build_temp, source).with_suffix(".o")
        stamp, rule = target.with_suffix(".command"), target.with_suffix(".d")
        nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
        command = [nvcc, "-c", str(source), "-o", str(target), "-MMD", "-MF", str(rule)]
        command += [*nvcc_flags, f"-I{csrc}", *targets_of(source)]
        made_by = stamp.read_text() if stamp.exists() and target.exists() else None
        if made_by == shlex.join(command) and target.stat().st_mtime > newest_of(rule):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(command)
        stamp.write_text(shlex.join(command))
        return target

    def folders_with_cudart(self) -> list[str]:
        """pip packages hold libcudart.so.13 alone; the linker looks for libcudart.so."""
        home = Path(CUDA_HOME)
        if any((home / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
            return []
        found = sorted(home.glob("lib*/libcudart.so.*"))
        if not found:
            sys.exit(f"moetrain: no libcudart in {home}; install the CUDA toolkit, or name another with CUDA_HOME")
        link = Path(self.build_temp, "cudart", "libcudart.so")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(found[-1])
        return [str(link.parent.resolve())]


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
            extra_compile_args={"cxx": host_flags},
        )
    ],
    cmdclass={"build_ext": BuildWithKernels},
)
