"""Runs the CUDA kernels' own source on the host, over the emulation of the GPU (csrc/cuda/README.md)."""

from pathlib import Path

import pytest
from emulated_kernels import SANITIZE, TESTS, Mutant, build, mutate, require_caught, run_area

AREAS = sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.cpp"))
HARMLESS = Mutant("a comment", "ptx/launch.h", "#pragma once", "#pragma once  // once", "FAIL")


def test_there_is_something_to_run() -> None:
    assert {"primitives", "copies", "tile_kernels", "grouped_gemm"} <= set(AREAS)


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


def test_a_mutant_whose_text_is_gone_is_refused(tmp_path: Path) -> None:
    gone = Mutant("gone", "ptx/launch.h", "no such text", "", "FAIL")
    with pytest.raises(AssertionError, match=r"the text to replace is not in ptx/launch\.h: no such text"):
        mutate(gone, tmp_path)
