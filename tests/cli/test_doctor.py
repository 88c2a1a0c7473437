import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from moetrain import _C
from moetrain.cli import doctor


def test_it_finds_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["value"] == importlib.metadata.version("torch")
    assert findings["gloo"]["ok"] is True
    assert findings["extension"]["value"] == f"built, {len(doctor.OPS)} of {len(doctor.OPS)} operators"
    assert findings["experts on CPU"]["value"].startswith(f"{_C.cpu_isas()[0]};")
    assert findings["threads"]["value"] == str(torch.get_num_threads())
    assert torch.backends.cpu.get_cpu_capability() in findings["cpu"]["value"]
    assert ("cuda:0" in findings) == torch.cuda.is_available()


def test_a_missing_package_fails_with_its_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == [
        "FAIL  safetensors        missing  -> pip install safetensors"
    ]


def test_a_missing_extension_fails_with_its_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = len(doctor.OPS)
    monkeypatch.setattr(doctor, "OPS", (*doctor.OPS, "no_such_op"))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    line = f"FAIL  extension          built, {built} of {built + 1} operators  -> pip install --no-build-isolation"
    assert line in text


def test_nvcc_is_looked_for_in_cuda_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert [f.value for f in doctor.examine() if f.name == "nvcc"] == ["none on PATH"]
    tool = tmp_path / "cuda" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1, V99'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert [f.value for f in doctor.examine() if f.name == "nvcc"] == [
        f"{tool}, Cuda compilation tools, release 99.1, V99"
    ]


def findings_on(capabilities: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> dict[str, doctor.Finding]:
    """What is said of expert_mlp on a machine with GPUs of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda idx: capabilities[idx])
    return {finding.name: finding for finding in doctor._experts_on_cuda()}


def test_the_path_on_each_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_CUDA_PATH", raising=False)
    findings = findings_on([(9, 0), (8, 0)], monkeypatch)
    names = "MOETRAIN_CUDA_PATH may ask for sm90, sm80, grouped_mm, simple or loop"
    assert findings["experts on cuda:0"].value == (
        f"bf16, D and F multiples of 8: sm90; in unaligned weights: grouped_mm; everything else: simple; {names}"
    )
    assert findings["experts on cuda:1"].value == (
        f"bf16, D and F multiples of 8: sm80; in unaligned weights: simple; everything else: simple; {names}"
    )


def test_a_forced_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "loop")
    findings = findings_on([(9, 0)], monkeypatch)
    assert findings["experts on cuda:0"].value == "loop, forced by MOETRAIN_CUDA_PATH"


def test_a_path_that_is_none_fails_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "fast")
    (finding,) = findings_on([(9, 0)], monkeypatch).values()
    assert (finding.ok, finding.cure) == (False, "unset MOETRAIN_CUDA_PATH")
    assert "got fast" in finding.value


def test_it_says_which_instruction_sets_are_compiled_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", "portable")
    monkeypatch.setattr(_C, "machine_isas", lambda: ["amx9", "portable"])
    assert doctor.main([]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "experts on CPU" in line)
    assert f" portable; compiled in: {', '.join(_C.built_isas())}; " in line
    assert "this machine has amx9, which is not compiled in  -> MOETRAIN_BUILD_ISA=native pip install" in line


def test_an_instruction_set_that_cannot_run_fails_with_its_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", "sse9")
    assert doctor.main([]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL"))
    assert "got sse9" in line
    assert line.endswith("-> unset MOETRAIN_CPU_ISA")
