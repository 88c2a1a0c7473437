"""The sorting networks that choose a row's largest keys, for each instruction set that this machine can run."""

import os
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
MACHINES = {"x86-64": set(), "x86-64-v3": {"avx2", "fma", "bmi2"}, "x86-64-v4": {"avx512f", "avx512bw", "avx512vl"}}

PROGRAM = """
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>
#include "cpu/routing/top_k_row.h"

int main() {
    std::mt19937 random(0);
    for (int64_t size : {1, 2, 7, 8, 9, 16, 63, 64, 65, 128, 200, 384}) {
        for (int64_t top_k = 1; top_k <= std::min<int64_t>(size, moetrain::kMaxTopKDepth); ++top_k) {
            for (int repeat = 0; repeat < 20; ++repeat) {
                std::vector<int32_t> key(moetrain::padded_for_top_k(size), INT32_MIN);
                const int32_t range = repeat % 2 == 0 ? 3 : INT32_MAX;  // ties, or none
                std::uniform_int_distribution<int32_t> values(-range, range);
                for (int64_t i = 0; i < size; ++i) key[i] = values(random);
                std::vector<int32_t> place(size), found(top_k, -1);
                std::iota(place.begin(), place.end(), 0);
                std::stable_sort(place.begin(), place.end(), [&](int a, int b) { return key[a] > key[b]; });
                moetrain::top_k_row(key.data(), size, top_k, found.data());
                MUTATE
                if (!std::equal(found.begin(), found.end(), place.begin())) {
                    std::printf("size %d, top_k %d\\n", static_cast<int>(size), static_cast<int>(top_k));
                    return 1;
                }
            }
        }
    }
}
"""


def run(machine: str, folder: Path, mutation: str = "") -> subprocess.CompletedProcess[str]:
    source, program = folder / "top_k_row.cpp", folder / "top_k_row"
    source.write_text(PROGRAM.replace("MUTATE", mutation))
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-march={machine}", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *system, str(source), "-o", str(program)], check=True, timeout=250)
    return subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)


def require_machine(machine: str) -> None:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
    if flags is None or not flags >= MACHINES[machine]:
        pytest.skip(f"this machine does not run {machine}")


@pytest.mark.parametrize("machine", MACHINES)
def test_chooses_as_a_stable_sort_does(machine: str, tmp_path: Path) -> None:
    require_machine(machine)
    done = run(machine, tmp_path)
    assert done.returncode == 0, done.stdout


def test_a_wrong_place_is_caught(tmp_path: Path) -> None:
    require_machine("x86-64")
    done = run("x86-64", tmp_path, "if (size == 65 && top_k == 3) std::swap(found[1], found[2]);")
    assert (done.returncode, done.stdout) == (1, "size 65, top_k 3\n")
