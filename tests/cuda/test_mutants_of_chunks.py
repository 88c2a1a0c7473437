"""Breaks the kernels of chunks, one way at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

CHUNKS = "chunks/chunks.cu"

MUTANTS = [
    Mutant(
        "what follows the last vector is forgotten",
        CHUNKS,
        "for (int64_t i = head + num_vecs * kSize + first; i < length; i += step)\n            to[i]",
        "for (int64_t i = head + num_vecs * kSize + first; i < head; i += step)\n            to[i]",
        r"(float|bf16|double) to \w+\[",
    ),
    Mutant(
        "what comes before the first vector is forgotten",
        CHUNKS,
        "for (int64_t i = first; i < head; i += step)\n            to[i]",
        "for (int64_t i = first; i < 0; i += step)\n            to[i]",
        r"(float|bf16|double) to \w+\[",
    ),
    Mutant(
        "vectors begin at the chunk's first element",
        CHUNKS,
        "store_vec(y, to + head + v * kSize)",
        "store_vec(y, to + v * kSize)",
        r"(float|bf16|double) to \w+\[|ended by signal",
    ),
    Mutant(
        "a term is left out",
        CHUNKS,
        "int64_t m = n + 1; m < end; ++m) {",
        "int64_t m = n + 2; m < end; ++m) {",
        r"sum .*\[",
    ),
    Mutant("every row begins a sum", CHUNKS, "if (n > 0 && adds_to_previous(table, n)) continue;", "", r"sum .*\["),
    Mutant(
        "sums of another length are joined",
        CHUNKS,
        "table[4 * n + 2] == table[4 * n - 2] && table[4 * n + 3] == table[4 * n - 1]",
        "table[4 * n + 2] == table[4 * n - 2]",
        r"sum .*\[",
    ),
    Mutant(
        "rows beyond the grid's are forgotten",
        CHUNKS,
        "n < num_rows; n += gridDim.y) {\n        const From* from",
        "n < num_rows; n += num_rows) {\n        const From* from",
        "last rows",
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("chunks", mutant, tmp_path)
