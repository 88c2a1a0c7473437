"""Compiles moetrain._C: the CPU part always, the CUDA part where torch and the machine both have CUDA."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from launch.native import compilers, isas
from launch.native.kernels import BUILD, CSRC, ROOT, built_isas, kernel_steps
from launch.native.ninja_file import Step, compile_step, run_ninja
from launch.native.torch_home import TorchHome, find_cuda_home, find_torch, folder_with_cudart


class BuildNative(build_ext):
    """Compiles into a folder that stays, so that the next build compiles what has changed.

    The folder is build/objects-TORCH, and build/kernels for what needs no torch, unless ``--build-temp`` names one for
    both: pip would take a new one each time.
    """

    def finalize_options(self) -> None:
        """Find torch, and name the folder."""
        named = self.build_temp is not None
        super().finalize_options()
        self.sanitize = os.environ.get("MOETRAIN_SANITIZE") == "1"  # see launch/sanitize.sh
        try:
            self.torch = find_torch()
        except ValueError as error:
            sys.exit(f"moetrain: {error}")
        if not named:
            suffix = "-sanitized" if self.sanitize else ""
            self.build_temp = str(BUILD / f"objects-torch-{self.torch.version}{suffix}")
        self.shared = Path(self.build_temp) if named or self.sanitize else BUILD

    def build_extension(self, ext: Extension) -> None:
        """Compile and link what is out of date, and hand the library on."""
        os.chdir(ROOT)
        folder = Path(self.build_temp)
        target = Path(self.get_ext_fullpath(ext.name))
        without_cuda = self.sanitize or os.environ.get("MOETRAIN_BUILD_CUDA") == "0"  # see launch/wheel.sh
        cuda_home = None if without_cuda else find_cuda_home(self.torch)
        env = {**os.environ, **compilers.cache_environment(ROOT)}
        jobs = compilers.jobs() or self.parallel
        try:
            steps = list(self.steps(folder, folder / target.name, cuda_home))
            run_ninja(folder / "build.ninja", self.shared, steps, jobs=jobs, quiet=self.verbose == 0, env=env)
        except ValueError as error:
            sys.exit(f"moetrain: {error}")
        except subprocess.CalledProcessError:
            sys.exit("error: moetrain's native extension did not compile; what the compiler said is above")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process may be running what was there
        shutil.copy2(folder / target.name, target)

    def copy_extensions_to_source(self) -> None:
        """Into moetrain/, where no other is left: Python would prefer one that is built for its own version alone."""
        for ext in self.extensions:
            package, _, name = ext.name.rpartition(".")
            for former in (ROOT / package.replace(".", "/")).glob(f"{name}.*so"):
                former.unlink()
        super().copy_extensions_to_source()

    def steps(self, folder: Path, library: Path, cuda_home: Path | None) -> Iterator[Step]:
        """What makes the library, the slowest first."""
        compiler = compilers.host_compiler()
        isas_built = built_isas(self.shared, compiler)
        objects = kernel_steps(self.shared, compiler, isas_built, sanitize=self.sanitize)
        for source in kernels_of(CSRC) if cuda_home else []:
            flags = [*compilers.NVCC_FLAGS, f"-I{CSRC}", *compilers.nvcc_targets(source)]
            objects.append(compile_step([str(cuda_home / "bin" / "nvcc")], source, folder, flags))
        flags = host_flags(self.torch, cuda_home, sanitize=self.sanitize)
        for unit in units_of(CSRC, with_cuda=cuda_home is not None, sanitize=self.sanitize):
            own = flags_of(unit, isas_built)
            objects.append(compile_step(compiler, write_unit(unit, folder), folder, [*own, *flags]))
        yield from objects
        inputs = [step.target for step in objects]
        command = [*compiler_of(compiler), "-shared", "-o", str(library), *map(str, inputs)]
        command += link_flags(self.torch, cuda_home, folder, sanitize=self.sanitize)
        yield Step(library, command, inputs, compiles=False)


def compiler_of(words: Sequence[str]) -> list[str]:
    """The command without a cache before it: there is nothing to cache in linking."""
    return list(words[1:] if Path(words[0]).name in compilers.CACHES else words)


def kernels_of(csrc: Path) -> list[Path]:
    """CUDA sources."""
    return sorted(csrc.glob("cuda/**/*.cu"))


@dataclass(frozen=True, slots=True)
class Unit:
    """Sources that are compiled as one, since the headers that they share take longer than they do.

    Names in their anonymous namespaces must therefore differ.
    """

    name: str
    sources: tuple[Path, ...]


def units_of(csrc: Path, *, with_cuda: bool, sanitize: bool) -> list[Unit]:
    """What is compiled with torch's headers: the CPU operators, a unit per family of CPU kernels, and the rest.

    What exchanges messages is one unit: torch's header of process groups includes all others.
    """
    others = [csrc / "cpu/isa/isa.cpp", csrc / "ops/operators.cpp", csrc / "bindings.cpp"]
    others += sorted(csrc.glob("ops/**/*_cuda.cpp")) if with_cuda else []
    others += [Path("tests/sanitizer/canary.cpp")] if sanitize else []
    families = sorted(path for path in (csrc / "cpu").iterdir() if path.name != "isa" and any(path.glob("*.cpp")))
    together = [Unit("comm", tuple(sorted((*csrc.glob("comm/*/*.cpp"), *csrc.glob("ops/comm/*.cpp")))))]
    together += [Unit("ops_cpu", tuple(sorted(csrc.glob("ops/*/*_cpu.cpp"))))]
    together += [Unit(f"cpu_{family.name}", tuple(sorted(family.glob("*.cpp")))) for family in families]
    together.append(Unit("planner", tuple(sorted((csrc / "planner").glob("*.cpp")))))
    together.append(Unit("planner_sequences", tuple(sorted((csrc / "planner" / "sequences").glob("*.cpp")))))
    return [*together, *(Unit(path.stem, (path,)) for path in others)]


def flags_of(unit: Unit, isas_built: Sequence[str]) -> list[str]:
    """What this unit is compiled with beside everybody's flags."""
    is_kernel = all(source.is_relative_to(CSRC / "cpu") for source in unit.sources)
    flags = (*compilers.FOR_SPEED, *isas.clone_flags(isas_built)) if is_kernel else compilers.FOR_ALL_ELSE
    if unit.name.startswith(
        "planner"
    ):  # all machines plan alike: no product and sum become one instruction where there is one
        flags = (*compilers.FOR_SPEED, *isas.clone_flags(isas_built), "-ffp-contract=off")
    if unit.name == "bindings":
        flags = (*flags, "-isystem", sysconfig.get_paths()["include"])
    # The warning is of anonymous namespaces in headers, for which it takes the sources of a unit.
    return [*flags, *(["-Wno-subobject-linkage"] if len(unit.sources) > 1 else [])]


def write_unit(unit: Unit, folder: Path) -> Path:
    """The file to compile: the source where there is one, else one in ``folder`` that includes them."""
    if len(unit.sources) == 1:
        return unit.sources[0]
    file = folder / "units" / f"{unit.name}.cpp"
    text = "".join(f'#include "{source.relative_to(CSRC)}"\n' for source in unit.sources)
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


def host_flags(torch: TorchHome, cuda_home: Path | None, *, sanitize: bool) -> list[str]:
    """Flags of every C++ source that includes torch's headers."""
    system = [*torch.include_dirs, *([cuda_home / "include"] if cuda_home else [])]
    flags = [*compilers.own_flags(sanitize=sanitize), f"-I{CSRC}", *(["-DMOETRAIN_WITH_CUDA"] if cuda_home else [])]
    # As system folders, to hear warnings about our own code alone.
    return flags + [flag for folder in system for flag in ("-isystem", from_root(folder))]


def link_flags(torch: TorchHome, cuda_home: Path | None, folder: Path, *, sanitize: bool) -> list[str]:
    """What the library needs: torch's own, found beside it where both are installed in one place."""
    flags = [*(compilers.SANITIZERS if sanitize else []), f"-L{from_root(torch.lib_dir)}", "-lc10", "-ltorch_cpu"]
    if cuda_home:
        flags += [f"-L{folder_with_cudart(cuda_home, folder / 'cudart')}", "-lcudart", "-lc10_cuda", "-ltorch_cuda"]
    return [*flags, "-Wl,-rpath,$ORIGIN/../torch/lib", *os.environ.get("LDFLAGS", "").split()]


def from_root(path: Path) -> str:
    """The path from ROOT where it is below it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
