"""Runs the CUDA kernels' own source on the host, over an emulation of the GPU (emulation/README.md)."""

from pathlib import Path

import pytest
from emulated_kernels import SANITIZE, TESTS, Mutant, build, mutate, require_caught, rewrite_kernel, run_area

AREAS = sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.cpp"))
HARMLESS = Mutant("a comment", "ptx/launch.h", "#pragma once", "#pragma once  // once", "FAIL")


def test_there_is_something_to_run() -> None:
    assert {"primitives", "copies", "tile_kernels", "grouped_gemm", "simple_kernels"} <= set(AREAS)


@pytest.mark.parametrize("area", AREAS)
def test_area(area: str) -> None:
    run_area(area)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_area_under_address_sanitizer(area: str) -> None:
    run_area(area, SANITIZE)


def test_an_unchanged_binary_is_not_built_again() -> None:
    binary = build("primitives")
    built_at = binary.stat().st_mtime_ns
    assert build("primitives").stat().st_mtime_ns == built_at


def test_a_change_without_effect_counts_as_missed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not noticed: a comment"):
        require_caught("primitives", HARMLESS, tmp_path)


def test_what_is_no_cpp_is_rewritten(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(
        "__shared__ Pair<int, T> pairs[4][kSize];\n"
        "extern __shared__ __align__(16) char memory[];\n"
        "add_kernel<T, int><<<dim3(2, 3), f<int>(x), 0,\n    stream>>>(a, b);\n"
    )
    rewritten = rewrite_kernel(source, tmp_path).read_text()
    assert (
        "auto& pairs = moetrain::emulation::shared_variable<Pair<int, T>[4][kSize]>(__PRETTY_FUNCTION__, " in rewritten
    )
    assert "char* memory = reinterpret_cast<char*>(moetrain::ptx::dynamic_shared_memory());" in rewritten
    assert "launch(dim3(2, 3), f<int>(x), 0,\n    stream)([](auto... arguments) { add_kernel<T, int>(" in rewritten
    assert "}, a, b);" in rewritten


def test_a_mutant_whose_text_is_gone_is_refused(tmp_path: Path) -> None:
    gone = Mutant("gone", "ptx/launch.h", "no such text", "", "FAIL")
    with pytest.raises(AssertionError, match=r"the text to replace is not in ptx/launch\.h: no such text"):
        mutate(gone, tmp_path)
