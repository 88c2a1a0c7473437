"""The includes of csrc point down, and each rule of launch/check_includes.py refuses what breaks it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "launch" / "check_includes.py"
SOUND = {
    "bindings.cpp": '#include <Python.h>\n#include "ops/rows/gather.h"\n#include "cpu/isa/isa.h"\n',
    "ops/common/checks.h": "#include <ATen/core/Tensor.h>\n",
    "ops/rows/gather.h": '#include "ops/common/checks.h"\n',
    "ops/rows/gather_cpu.cpp": '#include "cpu/rows/gather.h"\n#include "ops/rows/gather.h"\n',
    "ops/rows/gather_cuda.cpp": '#include <cuda_runtime_api.h>\n\n#include "cuda/rows/gather.h"\n',
    "cpu/isa/isa.h": '#include <vector>\n#include "cpu/rows/gather.h"\n',
    "cpu/rows/gather.h": '#include <ATen/Parallel.h>\n#include "common/math.h"\n',
    "cuda/rows/gather.h": '#include <cuda_bf16.h>\n#include "common/math.h"\n#include "cuda/common/launch.h"\n',
    "cuda/common/launch.h": '#include "cuda/ptx/launch.h"\n',
    "cuda/ptx/launch.h": "#include <cuda.h>\n",
    "planner/plan.cpp": '#include "common/math.h"\n',
    "common/math.h": "#include <cmath>\n",
}


def check(folder: Path, sources: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in sources.items():
        path = folder / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return subprocess.run([sys.executable, CHECK, folder], capture_output=True, text=True, check=False)


def test_the_includes_of_csrc_point_down() -> None:
    done = subprocess.run([sys.executable, CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_what_breaks_no_rule_passes(tmp_path: Path) -> None:
    done = check(tmp_path, SOUND)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize(
    ("file", "include", "complaint"),
    [
        ("cpu/rows/gather.h", '"ops/common/checks.h"', "cpu is not above ops"),
        ("cuda/rows/gather.h", '"ops/common/checks.h"', "cuda is not above ops"),
        ("cpu/rows/gather.h", '"cuda/common/launch.h"', "cpu is not above cuda"),
        ("cuda/rows/gather.h", '"cpu/isa/isa.h"', "cuda is not above cpu"),
        ("planner/plan.cpp", '"cpu/isa/isa.h"', "planner is not above cpu"),
        ("common/math.h", '"cpu/isa/isa.h"', "common is not above cpu"),
        ("ops/rows/gather.h", '"bindings.cpp"', "ops is not above bindings"),
        ("tools/tool.h", '"common/math.h"', "tools/ is no room"),
        ("ops/common/checks.h", '"ops/rows/gather.h"', "ops/common/ is what the other folders of ops/ stand on"),
        ("ops/rows/gather_cpu.cpp", '"gather.h"', "a header in quotes is one of csrc"),
        ("ops/rows/gather_cpu.cpp", '"../rows/gather.h"', "a header in quotes is one of csrc"),
        ("ops/rows/gather_cpu.cpp", '"ops/../cpu/isa/isa.h"', "a header in quotes is one of csrc"),
        ("ops/rows/gather_cpu.cpp", "<ops/rows/gather.h>", "headers of csrc stand in quotes"),
        ("cuda/rows/gather.h", "<ATen/core/Tensor.h>", "of torch and Python it may include nothing"),
        ("cuda/rows/gather.cu", "<c10/util/Half.h>", "of torch and Python it may include nothing"),
        ("common/math.h", "<torch/library.h>", "of torch and Python it may include nothing"),
        ("cpu/rows/gather.h", "<ATen/core/Tensor.h>", "it may include ATen/Parallel.h, c10/core/ScalarType.h"),
        ("cpu/isa/isa.h", "<c10/util/Half.h>", "of torch and Python it may include nothing"),
        ("cpu/tiles/tile.h", "<c10/util/Half.h>", "of torch and Python it may include nothing"),
        ("ops/rows/gather.h", "<pybind11/pybind11.h>", "it may include ATen/, c10/, torch/library.h"),
        ("ops/rows/gather.h", "<torch/extension.h>", "it may include ATen/, c10/, torch/library.h"),
        ("cpu/rows/gather.h", "<cuda_runtime.h>", "headers of CUDA are for cuda/"),
        ("ops/rows/gather_cpu.cpp", '"cuda/rows/gather.h"', "compiled without CUDA too"),
        ("ops/rows/gather.h", '"cuda/rows/gather.h"', "csrc/bindings.cpp reaches it, which is compiled without CUDA"),
    ],
)
def test_what_breaks_a_rule_is_named(tmp_path: Path, file: str, include: str, complaint: str) -> None:
    done = check(tmp_path, {**SOUND, file: SOUND.get(file, "") + f"#include {include}\n"})
    line = SOUND.get(file, "").count("\n") + 1
    assert done.returncode == 1, done.stdout
    assert f"csrc/{file}:{line} includes {include[1:-1]}: " in done.stdout
    assert complaint in done.stdout


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    done = check(tmp_path, {})
    assert done.returncode == 1
    assert "found no include below" in done.stderr
