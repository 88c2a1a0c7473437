"""Breaks Ampere's grouped GEMMs in known ways, one at a time, and requires the emulated tests to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

PIPELINE = "grouped_gemm/sm80/pipeline.h"
KERNEL = "grouped_gemm/sm80/kernel.h"
VARLEN_K = "grouped_gemm/sm80/varlen_k_kernel.h"
ARGUMENTS = "grouped_gemm/sm80/arguments.h"
SCHEDULER = "grouped_gemm/tile_scheduler.h"

WAIT = "        ptx::cp_async_wait<Config::kNumStages - 2>();\n"
BARRIER = "        ptx::sync_block();\n"
COMMIT = "        }\n        ptx::cp_async_commit();\n"
COMMIT_INSIDE = "        ptx::cp_async_commit();\n        }\n"
IN_FLIGHT = "is read while a copy"

GEMM_MUTANTS = [
    Mutant("one group too many in flight", PIPELINE, WAIT, WAIT.replace("2>", "1>"), IN_FLIGHT),
    Mutant("own copies awaited, others' not", PIPELINE, WAIT + BARRIER, WAIT, f"{IN_FLIGHT}|expected"),
    Mutant("copies awaited behind the barrier", PIPELINE, WAIT + BARRIER, BARRIER + WAIT, f"{IN_FLIGHT}|expected"),
    Mutant(
        "stage filled that is being read",
        PIPELINE,
        "loader.load_next(previous_stage_idx())",
        "loader.load_next(stage_idx_)",
        f"{IN_FLIGHT}|expected",
    ),
    Mutant(
        "one stage read again and again",
        PIPELINE,
        "stage_idx_ = stage_idx_ + 1 == Config::kNumStages ? 0 : stage_idx_ + 1;",
        "",
        f"{IN_FLIGHT}|expected",
    ),
    Mutant(
        "slots without gaps",
        ARGUMENTS,
        ".b_slot_stride = b_slot_stride",
        ".b_slot_stride = b_height * b_row_stride",
        "gaps.*\n *group .* expected",
    ),
    Mutant("no group without copies", KERNEL, COMMIT, COMMIT_INSIDE, IN_FLIGHT),
    Mutant(
        "first half of a step multiplied twice",
        PIPELINE,
        "load_fragments(second_half, kHalfStep)",
        "load_fragments(second_half, 0)",
        "expected",
    ),
    Mutant(
        "sums of the last tile kept",
        PIPELINE,
        "                accumulator = 0;",
        "                accumulator += 1;",
        "expected",
    ),
    Mutant(
        "second half beside a swizzled row",
        PIPELINE,
        "(offset ^ (k * kBytes)) + mn",
        "offset + k * kBytes + mn",
        "moved to|expected",
    ),
    Mutant(
        "next columns beside a swizzled row",
        PIPELINE,
        "(offset ^ (mn % kBlockWidth * kBytes))",
        "(offset + mn % kBlockWidth * kBytes)",
        "moved to|expected",
    ),
    Mutant(
        "rows of a K-major tile in one bank",
        PIPELINE,
        "swizzled_chunk_offset<Swizzle::k64>(mn, k / kChunkElements)",
        "2 * (mn * kStepDepth + k)",
        "gather.*\n *.*bank conflict",
    ),
    Mutant(
        "rows of an MN-major tile in one bank",
        PIPELINE,
        "swizzled_chunk_offset<Swizzle::k128>(k, mn % kBlockWidth / kChunkElements)",
        "2 * (k * kBlockWidth + mn % kBlockWidth)",
        "MN-major B.*\n *.*bank conflict",
    ),
    Mutant(
        "blocks of an MN-major tile half as far apart",
        PIPELINE,
        "return mn / kBlockWidth * (kStepDepth * kSwizzleRowBytes) +\n               swizzled",
        "return mn / kBlockWidth * (kStepDepth * kSwizzleRowBytes / 2) +\n               swizzled",
        "two chunks|MN-major B.*\n *.*expected",
    ),
    Mutant(
        "quarters of A in B's order",
        PIPELINE,
        "lane_offset<Config::kMajorA, true>",
        "lane_offset<Config::kMajorA, false>",
        "group .* expected",
    ),
    Mutant(
        "quarters of B in A's order",
        PIPELINE,
        "lane_offset<Config::kMajorB, false>",
        "lane_offset<Config::kMajorB, true>",
        "group .* expected",
    ),
    Mutant(
        "B not transposed",
        PIPELINE,
        "ptx::ldmatrix_x4<Config::kMajorB == Major::kMn>",
        "ptx::ldmatrix_x4<false>",
        "MN-major B.*\n *group .* expected",
    ),
    Mutant(
        "every warp takes the first rows",
        PIPELINE,
        "return warp_m_ * Config::kWarpM;",
        "return 0 * warp_m_;",
        "group .* expected",
    ),
    Mutant(
        "every warp takes the first columns",
        PIPELINE,
        "return warp_n_ * kWarpPart;",
        "return 0 * warp_n_;",
        "group .* expected",
    ),
    Mutant(
        "halves of K of B exchanged",
        PIPELINE,
        "b[octet % 2 * 2], b[octet % 2 * 2 + 1]",
        "b[octet % 2 * 2 + 1], b[octet % 2 * 2]",
        "group .* expected",
    ),
    Mutant(
        "every pass copies to the first rows",
        PIPELINE,
        "+ first + pass * kRowsPerPass * kRowBytes",
        "+ first + 0 * pass * kRowBytes",
        f"{IN_FLIGHT}|expected",
    ),
    Mutant(
        "gathered rows in order", KERNEL, ": arguments_.row_indices[row];", ": row;", "outside every|gather.*\n.*exp"
    ),
    Mutant(
        "rows of A without gaps",
        KERNEL,
        "int64_t{rows_[pass]} * arguments_.a_stride",
        "int64_t{rows_[pass]} * arguments_.depth",
        "gaps.*\n *group .* expected",
    ),
    Mutant(
        "A copied beyond its depth",
        KERNEL,
        "pass * CopyA::kRowsPerPass < rows_left_ && k < arguments_.depth",
        "pass * CopyA::kRowsPerPass < rows_left_",
        "outside every tensor",
    ),
    Mutant(
        "columns beyond B copied",
        KERNEL,
        "column < part_columns && k < arguments_.depth",
        "k < arguments_.depth",
        "outside every tensor",
    ),
    Mutant(
        "rows of an MN-major B beyond its depth copied",
        KERNEL,
        "column < arguments_.num_columns && k < arguments_.depth",
        "column < arguments_.num_columns",
        "outside every tensor",
    ),
    Mutant(
        "another group's slot of B", SCHEDULER, "arguments.slots[tile.group_idx]", "tile.group_idx", "group .* expect"
    ),
    Mutant(
        "every tile copies the first columns",
        KERNEL,
        "column_ = tile.n_tile_idx * kTilePart;",
        "column_ = 0;",
        "group .* expected",
    ),
    Mutant(
        "rows of an MN-major B without gaps",
        KERNEL,
        "int64_t{k} * arguments_.b_row_stride",
        "int64_t{k} * arguments_.num_columns",
        "gaps.*\n *group .* expected",
    ),
    Mutant(
        "a step too many loaded",
        KERNEL,
        "if (k_ >= arguments_.depth) open_tile();",
        "if (k_ > arguments_.depth) open_tile();",
        "expected|did not wait for",
    ),
    Mutant(
        "the last, partial step not multiplied",
        KERNEL,
        "ceil_div(arguments.depth, kStepDepth)",
        "arguments.depth / kStepDepth",
        "expected|did not wait for",
    ),
    Mutant(
        "row blocks stored over one another",
        KERNEL,
        "pipeline.warp_row() + block * kMmaRows",
        "pipeline.warp_row() + 0 * block",
        "expected",
    ),
    Mutant(
        "warps' columns stored over one another",
        KERNEL,
        "TilePipeline::kTilePart + pipeline.warp_column(),",
        "TilePipeline::kTilePart,",
        "expected",
    ),
]

VARLEN_K_MUTANTS = [
    Mutant("no group without copies, along K", VARLEN_K, COMMIT, COMMIT_INSIDE, IN_FLIGHT),
    Mutant(
        "the group's last row summed again",
        VARLEN_K,
        "pass * Copy::kRowsPerPass < rows_left_ && column_ < operand.width",
        "column_ < operand.width",
        "slot .* expected",
    ),
    Mutant(
        "columns beyond the operand copied",
        VARLEN_K,
        "pass * Copy::kRowsPerPass < rows_left_ && column_ < operand.width",
        "pass * Copy::kRowsPerPass < rows_left_",
        "outside every tensor",
    ),
    Mutant(
        "gathered rows in order, along K",
        VARLEN_K,
        ": operand.row_indices[row];",
        ": row;",
        "slot .* expected|outside every tensor",
    ),
    Mutant(
        "rows copied without gaps",
        VARLEN_K,
        "int64_t{rows_[pass]} * operand.stride",
        "int64_t{rows_[pass]} * operand.width",
        "slot .* expected",
    ),
    Mutant(
        "rows left counted from the first thread's",
        VARLEN_K,
        "step.row_end - step.row_begin - Copy::row(0);",
        "step.row_end - step.row_begin;",
        "slot .* expected",
    ),
    Mutant(
        "every tile of A the first",
        VARLEN_K,
        "step, tile_.m_tile_idx * Config::kTileM);",
        "step, 0);",
        "slot .* expected",
    ),
    Mutant(
        "rows of one slot for all",
        VARLEN_K,
        "rows_of<kStepDepth>(arguments_, tile_.slot)",
        "rows_of<kStepDepth>(arguments_, 0)",
        "expected",
    ),
    Mutant(
        "a slot's rows stored in the first",
        VARLEN_K,
        "const int slot_row = tile.slot * arguments.a.width;",
        "const int slot_row = 0 * tile.slot;",
        "expected",
    ),
    Mutant(
        "rows beyond the slot's matrix stored",
        VARLEN_K,
        "slot_row + arguments.a.width, column",
        "slot_row + arguments.a.width + 64, column",
        "expected|outside the output",
    ),
    Mutant(
        "A not transposed",
        PIPELINE,
        "ptx::ldmatrix_x4<Config::kMajorA == Major::kMn>",
        "ptx::ldmatrix_x4<false>",
        "slot .* expected",
    ),
]

EXPERT_MUTANTS = [
    Mutant(
        "up half copied from the gate's rows",
        KERNEL,
        "const int64_t row = part * part_columns + column;",
        "const int64_t row = 0 * part + column;",
        "SwiGLU.*\n *h, up.* expected",
    ),
    Mutant(
        "warps multiply neighbouring columns, not gate and up",
        PIPELINE,
        "column / kWarpPart * kTilePart + column % kWarpPart",
        "column",
        "SwiGLU.*\n *h, .* expected",
    ),
    Mutant(
        "parts of dS over one another, of warps",
        KERNEL,
        "tile.n_tile_idx * Config::kWarpsN + pipeline.warp_n_idx()",
        "tile.n_tile_idx",
        "weight_grad.*expected",
    ),
]

AREA_OF_MUTANT = {
    **{mutant.name: ("grouped_gemm_sm80", mutant) for mutant in GEMM_MUTANTS},
    **{mutant.name: ("varlen_k_sm80", mutant) for mutant in VARLEN_K_MUTANTS},
    **{mutant.name: ("expert_mlp_gemms_sm80", mutant) for mutant in EXPERT_MUTANTS},
}
MUTANTS = [mutant for _, mutant in AREA_OF_MUTANT.values()]


def test_every_mutant_finds_its_text() -> None:
    assert len(MUTANTS) == len(GEMM_MUTANTS) + len(VARLEN_K_MUTANTS) + len(EXPERT_MUTANTS), "two mutants have one name"
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    area, _ = AREA_OF_MUTANT[mutant.name]
    require_caught(area, mutant, tmp_path)
