"""Where torch is and what it was built with, found without importing it, which takes seconds."""

import importlib.util
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

USUAL_CUDA_HOME = Path("/usr/local/cuda")


@dataclass(frozen=True, slots=True)
class TorchHome:
    """An installed torch. ``cuda`` is the version of CUDA that it was built with, or None."""

    root: Path
    version: str
    cuda: str | None

    @property
    def include_dirs(self) -> list[Path]:
        """Folders of torch's headers."""
        return [self.root / "include", self.root / "include" / "torch" / "csrc" / "api" / "include"]

    @property
    def lib_dir(self) -> Path:
        """Folder of torch's libraries."""
        return self.root / "lib"


def find_torch() -> TorchHome:
    """Find the torch that this Python would import.

    Raises:
        ValueError: there is none.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ValueError(
            "the extension is built against the torch it will run with, and there is none: install torch, then pip "
            "install --no-build-isolation ."
        )
    root = Path(spec.origin).parent
    version = runpy.run_path(str(root / "version.py"))
    return TorchHome(root, str(version["__version__"]), version["cuda"])


def find_cuda_home(torch: TorchHome) -> Path | None:
    """Find the CUDA toolkit for that torch, or None where torch or the machine has no CUDA.

    Where torch's own CUDA packages hold nvcc, no other toolkit fits better, unless ``CUDA_HOME`` names one.
    """
    if torch.cuda is None:
        return None
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    packaged = torch.root.parent / "nvidia" / f"cu{torch.cuda.partition('.')[0]}"
    if (packaged / "bin" / "nvcc").is_file():
        return packaged
    # What is on the path may be a link or a script that starts the nvcc of a toolkit elsewhere.
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += [USUAL_CUDA_HOME] if USUAL_CUDA_HOME.exists() else []
    whole = (home for home in homes if (home / "include" / "cuda_runtime.h").is_file())
    return next(whole, homes[0] if homes else None)


def folder_with_cudart(home: Path, links: Path) -> Path:
    """A folder in which the linker finds libcudart.so: pip packages hold libcudart.so.13 alone, so a link is made.

    Args:
        home: the CUDA toolkit.
        links: where the link may be made.
    """
    for lib in (home / "lib64", home / "lib"):
        if (lib / "libcudart.so").exists():
            return lib
    found = sorted(home.glob("lib*/libcudart.so.*"))
    if not found:
        sys.exit(f"moetrain: no libcudart in {home}; install the CUDA toolkit, or name another with CUDA_HOME")
    link = links / "libcudart.so"
    links.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(found[-1])
    return links
