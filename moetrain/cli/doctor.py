"""``moetrain doctor``: what this machine has, what is missing, and the cure."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import moetrain
from moetrain.built_with import BUILD, library, require_fit

OPS = (
    "route",
    "select_experts",
    "group_pairs",
    "gather_rows",
    "scatter_add_rows",
    "grouped_gemm",
    "grouped_gemm_varlen_k",
    "expert_mlp",
    "causal_attention",
    "rms_norm",
    "rotate",
    "pack_chunks",
    "unpack_chunks_",
    "add_sources_",
)
REQUIRED = ("torch", "numpy", "rich", "safetensors", "tyro")
OPTIONAL = ("megatron-core", "transformers", "tokenizers", "wandb", "pytest", "hypothesis")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``ok`` is None where it is only worth knowing; ``cure`` where it is not ok."""

    name: str
    value: str
    ok: bool | None = None
    cure: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 where training can start, 1 where something it needs is missing."""
    parser = argparse.ArgumentParser(prog="moetrain doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    findings = examine()
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(map(_line, findings)) + "\n")
    return 1 if any(finding.ok is False for finding in findings) else 0


def examine() -> list[Finding]:
    """Look at everything; nothing raises, and missing things become findings."""
    findings = [
        Finding("moetrain", moetrain.__version__),
        Finding("python", platform.python_version(), sys.version_info >= (3, 11), "use Python 3.11 or newer"),
        *[_package(name, required=True) for name in REQUIRED],
        *[_package(name, required=False) for name in OPTIONAL],
        Finding("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())),
    ]
    if importlib.util.find_spec("torch") is not None:
        findings += [*_devices(), *_backends(), *_extension()]
    findings.append(_nvcc())
    return findings


def _package(name: str, *, required: bool) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), True if required else None)
    except importlib.metadata.PackageNotFoundError:
        cure = f"pip install {name}"
        return Finding(name, "missing", False if required else None, cure if required else f"optional: {cure}")


def _devices() -> list[Finding]:
    import torch

    findings = [
        Finding("cpu", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("threads", str(torch.get_num_threads())),
    ]
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        return [*findings, Finding("cuda", f"none ({why}); training runs on CPUs")]
    for idx in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(idx)
        text = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, CUDA {torch.version.cuda}"
        findings.append(Finding(f"cuda:{idx}", text))
    return findings


def _backends() -> list[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return [Finding("torch.distributed", "missing", False, "install a torch that is built with it")]
    needs_nccl = torch.cuda.is_available()
    nccl = dist.is_nccl_available()
    return [
        Finding("gloo", _yes(dist.is_gloo_available()), dist.is_gloo_available(), "install a torch built with gloo"),
        Finding(
            "nccl", _yes(nccl), nccl if needs_nccl else None, "install a CUDA build of torch" if needs_nccl else ""
        ),
    ]


def _extension() -> list[Finding]:
    import torch

    try:
        if found := library():
            require_fit(found, torch.__version__)
        from moetrain import _C
    except ImportError as error:
        return [Finding("extension", f"missing ({error})", False, BUILD)]
    missing = [name for name in OPS if not hasattr(torch.ops.moetrain, name)]
    has_cuda = bool(_C.has_cuda)
    cuda_ok = None if not torch.cuda.is_available() else has_cuda
    return [
        Finding("extension", f"built, {len(OPS) - len(missing)} of {len(OPS)} operators", not missing, BUILD),
        _experts_on_cpu(),
        *(_experts_on_cuda() if has_cuda else []),
        Finding(
            "extension CUDA", _yes(has_cuda), cuda_ok, f"put nvcc on PATH, then {BUILD}" if cuda_ok is False else ""
        ),
    ]


def _experts_on_cpu() -> Finding:
    """The instruction set that ``expert_mlp`` and ``causal_attention`` use, and what else there is to choose from."""
    from moetrain import _C

    rebuild = "MOETRAIN_BUILD_ISA=native pip install --no-build-isolation --no-deps -e . (in the source folder)"
    built = f"compiled in: {', '.join(_C.built_isas())}"
    try:
        used = _C.cpu_isa()
    except ValueError as error:
        return Finding("experts on CPU", str(error), False, "unset MOETRAIN_CPU_ISA")
    others = ", ".join(name for name in _C.cpu_isas() if name != used)
    text = f"{used}; {built}; MOETRAIN_CPU_ISA may ask for {others or 'nothing else'}"
    best = _C.machine_isas()[0]
    if best in _C.built_isas():
        return Finding("experts on CPU", text)
    return Finding("experts on CPU", f"{text}; this machine has {best}, which is not compiled in", None, rebuild)


def _experts_on_cuda() -> list[Finding]:
    """Which path ``expert_mlp`` takes on each GPU, and what forces one."""
    import torch

    from moetrain.ops.cuda_path import CUDA_PATHS, VARIABLE, paths_of, wanted_cuda_path

    try:
        wanted = wanted_cuda_path()
    except ValueError as error:
        return [Finding("experts on CUDA", str(error), False, f"unset {VARIABLE}")]
    findings = []
    for idx in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        paths = paths_of(torch.cuda.get_device_capability(idx))
        chosen = "; ".join(f"{inputs}: {path}" for inputs, path in paths.items())
        text = (
            f"{wanted}, forced by {VARIABLE}" if wanted else f"{chosen}; {VARIABLE} may ask for {_any_of(CUDA_PATHS)}"
        )
        findings.append(Finding(f"experts on cuda:{idx}", text))
    return findings


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc") or (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None)
    if path is None:
        return Finding("nvcc", "none on PATH", None, "needed only to build for GPUs: install the CUDA toolkit")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("nvcc", f"{path} does not run ({error})", None, "reinstall the CUDA toolkit")
    release = next((line for line in done.stdout.splitlines() if "release" in line), "").strip()
    return Finding("nvcc", f"{path}, {release}")


def _yes(there: bool) -> str:
    return "yes" if there else "no"


def _line(finding: Finding) -> str:
    mark = {True: "ok  ", False: "FAIL", None: "    "}[finding.ok]
    cure = f"  -> {finding.cure}" if finding.cure and finding.ok is not True else ""
    return f"{mark}  {finding.name:<18} {finding.value}{cure}"
