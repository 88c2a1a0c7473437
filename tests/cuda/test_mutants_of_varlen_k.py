"""Breaks the grouped GEMM along K in known ways, one at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

KERNEL = "grouped_gemm/sm90/varlen_k_kernel.h"
EPILOGUE = "grouped_gemm/epilogue.h"
PIPELINE = "grouped_gemm/sm90/pipeline.h"
SCHEDULER = "grouped_gemm/tile_scheduler.h"
DESCRIPTOR = "common/matrix_descriptor.h"

MUTANTS = [
    Mutant("rows of the next group taken in", KERNEL, "row < step.row_end;", "true;", "expected|outside every tensor"),
    Mutant(
        "TMA takes a step that is not whole",
        KERNEL,
        "step.row_begin + Config::kTileK <= step.row_end",
        "step.row_begin < step.row_end",
        "slot .* expected",
    ),
    Mutant(
        "no step counts as whole", KERNEL, "is_whole && arguments_.b.row_indices == nullptr", "true", "expected|encoded"
    ),
    Mutant("gathered rows in order", KERNEL, ": operand.row_indices[row];", ": row;", "expected|outside every tensor"),
    Mutant(
        "no bytes expected of A",
        KERNEL,
        "(a_by_tma ? Pipeline<Config>::kTileBytesA : 0)",
        "0",
        "race: wgmma reads|deadlock",
    ),
    Mutant(
        "bytes expected of B that nobody sends",
        KERNEL,
        "(b_by_tma ? Pipeline<Config>::kTileBytesB : 0)",
        "Pipeline<Config>::kTileBytesB",
        "deadlock",
    ),
    Mutant("cp.async never arrive", KERNEL, "        ptx::cp_async_arrive(full_barrier);\n", "", "deadlock"),
    Mutant(
        "columns beyond the operand copied",
        KERNEL,
        "sources[pass] >= 0 && column < operand.width",
        "sources[pass] >= 0",
        "outside every tensor|expected",
    ),
    Mutant(
        "rows copied without gaps",
        KERNEL,
        "sources[pass] * operand.stride",
        "sources[pass] * int64_t{operand.width}",
        "slot .* expected",
    ),
    Mutant(
        "every block of columns is the first",
        KERNEL,
        "column + block * kSwizzleRowElements;",
        "column;",
        "2 consumers.*\n *slot .* expected",
    ),
    Mutant(
        "blocks of a tile half as far apart",
        KERNEL,
        "tile + block * Pipeline<Config>::kBlockElements",
        "tile + block * Pipeline<Config>::kBlockElements / 2",
        "race|expected|deadlock",
    ),
    Mutant(
        "one row copied in every pass",
        KERNEL,
        "const int row_idx = pass * kRowsPerPass + ptx::thread_idx() / 8;",
        "const int row_idx = ptx::thread_idx() / 8;",
        "race|expected|in flight",
    ),
    Mutant(
        "the last step copies the next one's rows",
        KERNEL,
        "load_step(tile, step, sources",
        "load_step(tile, step, next_sources",
        "expect",
    ),
    Mutant(
        "a slot's rows stored in the first",
        KERNEL,
        "const int slot_row = tile.slot * arguments_.a.width;",
        "const int slot_row = 0 * tile.slot;",
        "expected",
    ),
    Mutant(
        "rows beyond the slot's matrix stored",
        KERNEL,
        "slot_row + arguments_.a.width,",
        "slot_row + arguments_.a.width + 64,",
        "expected|outside the output",
    ),
    Mutant(
        "both consumers store the same rows",
        KERNEL,
        "consumer_idx * Config::kRowBlocks + block;",
        "0 * consumer_idx + block;",
        "2 consumers.*\n *slot .* expected",
    ),
    Mutant("m tiles counted as n tiles", SCHEDULER, "ceil_div(arguments.a.width, Config::kTileM)", "1", "expected"),
    Mutant("tail tile of columns left out", SCHEDULER, "ceil_div(arguments.b.width, Config::kTileN)", "1", "expected"),
    Mutant(
        "A read as if K-major",
        PIPELINE,
        "descriptor_at<Config::kMajorA>(block_address",
        "descriptor_at<Major::kK>(block_address",
        "expected|race",
    ),
    Mutant(
        "blocks of an MN-major operand half as far apart",
        PIPELINE,
        "kBlockElements * sizeof(Bf16));",
        "kBlockElements);",
        "2 consumers.*\n *slot .* expected",
    ),
    Mutant(
        "leading and stride bytes exchanged",
        DESCRIPTOR,
        "block_bytes, 8 * swizzle_row_bytes(kSwizzle), kSwizzle",
        "8 * swizzle_row_bytes(kSwizzle), block_bytes, kSwizzle",
        "slot .* expected|race",
    ),
    Mutant(
        "fp32 sums replaced instead of added to",
        EPILOGUE,
        "if (accumulates) {",
        "if (false) {",
        "added.*\n *slot .* exp",
    ),
    Mutant(
        "fp32 rows beyond the slot's matrix stored",
        EPILOGUE,
        "            if (row >= position.row_end) continue;\n            float*",
        "            float*",
        "fp32.*\n.*(outside the output|expected)",
    ),
    Mutant("sums of the last tile kept", PIPELINE, "        set_to_zero(accumulators);  //", "        //", "expected"),
    Mutant("no proxy fence", PIPELINE, "if constexpr (Config::kUsesCpAsync) ptx::fence_async_proxy();", "", "proxy"),
    Mutant(
        "an empty slot releases a stage",
        PIPELINE,
        "if (num_k_steps > 0) release_stage",
        "if (num_k_steps >= 0) release_stage",
        "more than the|race|deadlock|proxy",
    ),
    Mutant(
        "groups of a slot, but the first, left out",
        SCHEDULER,
        "if (next_ >= end_) return false;",
        "return false;",
        "num_steps is not|expected|deadlock",
    ),
    Mutant(
        "slots taken for groups",
        SCHEDULER,
        "slot_groups_ == nullptr ? next_ : slot_groups_[next_]",
        "next_",
        "slot .*",
    ),
    Mutant(
        "steps counted without the last, partial one",
        SCHEDULER,
        "num_steps += ceil_div(walk.row_end_ - walk.row_, kRows);",
        "num_steps += (walk.row_end_ - walk.row_) / kRows;",
        "num_steps is not|expected|race|deadlock",
    ),
    Mutant(
        "m and n of a tile exchanged",
        SCHEDULER,
        "static_cast<int>(tile_idx_ % num_m_tiles_)",
        "static_cast<int>(tile_idx_ % num_n_tiles_)",
        "not those there are",
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("varlen_k", mutant, tmp_path)
