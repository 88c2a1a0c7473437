"""Breaks the simple kernels, one way at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

GATHER = "gather_rows.cu"
GROUP = "group_pairs.cu"
SCATTER = "scatter_add_rows.cu"
SELECT = "select_experts.cu"
SELECT_ROW = "select_experts_row.cuh"
GEMM = "grouped_gemm.cu"
VARLEN_K = "grouped_gemm_varlen_k.cu"

MUTANTS = [
    Mutant(
        "gather beyond the list's length", GATHER, "length == nullptr ? num_rows : *length", "num_rows", "y of width"
    ),
    Mutant(
        "scan reads a neighbour that has moved on",
        GROUP,
        """        const int32_t before = i >= step ? shared[i - step] : 0;
        __syncthreads();
""",
        """        const int32_t before = i >= step ? shared[i - step] : 0;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "scan goes on before all have added",
        GROUP,
        """        shared[i] += before;
        __syncthreads();
""",
        """        shared[i] += before;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "scan's scratch used again too soon",
        GROUP,
        """    const int32_t exclusive = shared[i] - x;
    __syncthreads();
""",
        """    const int32_t exclusive = shared[i] - x;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "places taken while peers still read them",
        GROUP,
        """write(next[bucket] + rank, i);
        __syncwarp();
        if (inside && rank == 0)""",
        """write(next[bucket] + rank, i);
        if (inside && rank == 0)""",
        r"pair\[|ended by signal",
    ),
    Mutant("rank counts the lane itself", GROUP, "((1U << lane) - 1)", "((2U << lane) - 1)", r"pair\[|ended by signal"),
    Mutant(
        "counters added to before they are zero",
        GROUP,
        """        counter[b] = 0;
    __syncwarp();
""",
        """        counter[b] = 0;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "sums of warps overwritten too soon",
        SCATTER,
        "        __syncthreads();  // warp_sum is about to be overwritten\n",
        "",
        r"x\[",
    ),
    Mutant(
        "pairs left in the order they came",
        SCATTER,
        "ordered[segment_begin + rank] = pair;",
        "ordered[i] = pair;",
        "in order",
    ),
    Mutant("weights forgotten", SCATTER, "weight == nullptr ? value : weight[pair] * value", "value", r"x\["),
    Mutant("tie goes to the higher id", SELECT_ROW, "key[e] > most ||", "key[e] >= most ||", r"expert_id\["),
    Mutant(
        "next key sought before the last is marked",
        SELECT_ROW,
        """    if (lane == 0) key[place] = taken;
    __syncwarp();
""",
        """    if (lane == 0) key[place] = taken;
""",
        r"expert_id\[",
    ),
    Mutant(
        "a row's sum read before all strides are there",
        SELECT,
        """        shared[threadIdx.y][threadIdx.x] = sum;
        __syncthreads();
""",
        """        shared[threadIdx.y][threadIdx.x] = sum;
""",
        r"prob_sum\[",
    ),
    Mutant(
        "one stride of tokens left out",
        SELECT,
        "for (int r = 1; r < kSumRows; ++r)",
        "for (int r = 2; r < kSumRows; ++r)",
        r"prob_sum\[",
    ),
    Mutant(
        "operands overwritten while others multiply",
        GEMM,
        "        __syncthreads();  // the operands are about to be overwritten\n",
        "",
        r"c\[",
    ),
    Mutant(
        "every tile of a group is its first",
        GEMM,
        "__shfl_sync(kWholeWarp, tile_begin, source)",
        "__shfl_sync(kWholeWarp, begin, source)",
        r"c\[",
    ),
    Mutant(
        "operands of varlen-K overwritten while others multiply",
        VARLEN_K,
        "            __syncthreads();  // the operands are about to be overwritten\n",
        "",
        r"out\[",
    ),
    Mutant("another group's slot", GEMM, "args.slot[tile.group]", "tile.group", r"c\["),
    Mutant(
        "tile found before it is shared",
        GEMM,
        "    __syncthreads();\n    const RowTile tile",
        "    const RowTile tile",
        r"c\[|deadlock",
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("simple_kernels", mutant, tmp_path)
