"""Breaks the grouped GEMM of Hopper in known ways, one at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

KERNEL = "grouped_gemm/sm90/kernel.h"
PIPELINE = "grouped_gemm/sm90/pipeline.h"
DESCRIPTOR = "common/matrix_descriptor.h"
EPILOGUE = "grouped_gemm/epilogue.h"
ARGUMENTS = "grouped_gemm/sm90/arguments.h"
SCHEDULER = "grouped_gemm/tile_scheduler.h"

WAIT_FULL = "ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase);"
WAIT_EMPTY = "ptx::mbarrier_wait(&storage_.empty_barrier[ring.stage_idx], ring.phase ^ 1);"
FENCE = "            if constexpr (Config::kUsesCpAsync) ptx::fence_async_proxy();\n"
TURN = "(num_own_tiles ^ consumer_idx ^ 1) & 1"

MUTANTS = [
    Mutant("consumer does not wait for the full barrier", PIPELINE, WAIT_FULL, "", "race: wgmma reads|got -?nan"),
    Mutant(
        "consumer waits for the wrong phase",
        PIPELINE,
        WAIT_FULL,
        WAIT_FULL.replace("ring.phase", "ring.phase ^ 1"),
        "race: wgmma reads|got -?nan|deadlock",
    ),
    Mutant("producer starts with the wrong phase", PIPELINE, WAIT_EMPTY, WAIT_EMPTY.replace(" ^ 1", ""), "deadlock"),
    Mutant("producer does not wait for the empty barrier", PIPELINE, WAIT_EMPTY, "", "race: wgmma reads|more than the"),
    Mutant("phase never flips", PIPELINE, "phase ^= 1;", "", "race: wgmma reads|deadlock|more than the"),
    Mutant(
        "stage released while wgmma still reads it", PIPELINE, "wait<1>(accumulators)", "wait<2>(accumulators)", "race"
    ),
    Mutant(
        "last stage released before its wgmma are retired",
        PIPELINE,
        """        wait<0>(accumulators);
        if (num_k_steps > 0) release_stage(ring.previous_stage_idx());
""",
        """        if (num_k_steps > 0) release_stage(ring.previous_stage_idx());
        wait<0>(accumulators);
""",
        "race: wgmma reads",
    ),
    Mutant(
        "accumulators used before the last wgmma is retired",
        PIPELINE,
        "        wait<0>(accumulators);\n",
        "",
        "got -?nan|did not wait|race|was written while",
    ),
    Mutant("no proxy fence between cp.async and wgmma", PIPELINE, FENCE, "", "proxy: wgmma reads"),
    Mutant("no wgmma fence", PIPELINE, "ptx::wgmma_fence();", "", "without wgmma_fence"),
    Mutant("no block barrier after mbarrier_init", PIPELINE, "ptx::sync_block();", "", "used before mbarrier_init"),
    Mutant("barriers not published to TMA", PIPELINE, "ptx::fence_mbarrier_init();", "", "has not published"),
    Mutant(
        "too few arrivals on the empty barrier",
        PIPELINE,
        "Config::kConsumersPerTile * kWarps",
        "Config::kConsumersPerTile",
        "race: wgmma reads|more than the|deadlock",
    ),
    Mutant(
        "step along K half as long",
        PIPELINE,
        "tile_address + k * static_cast<int>(sizeof(Bf16))",
        "tile_address + k",
        "group .* expected",
    ),
    Mutant(
        "step along K of an MN-major tile half as long",
        PIPELINE,
        "tile_address + k * kSwizzleRowBytes",
        "tile_address + k * kSwizzleRowBytes / 2",
        "MN-major B.*\n *group .* expected",
    ),
    Mutant(
        "every row block multiplies the first",
        PIPELINE,
        "a_address + block * kBlockElements",
        "a_address + 0 * block * kBlockElements",
        "2 row blocks.*\n *group .* expected",
    ),
    Mutant(
        "both consumers multiply the first rows",
        PIPELINE,
        "Config::kPingPong ? 0 : consumer_idx * Config::kRowBlocks;",
        "0 * consumer_idx;",
        "2 consumers.*\n *group .* expected",
    ),
    Mutant("sums of the last tile kept", PIPELINE, "        set_to_zero(accumulators);  //", "        //", "expected"),
    Mutant("a consumer never passes the turn", PIPELINE, "pass_turn(consumer_idx);\n        wait", "wait", "deadlock"),
    Mutant("turns of the wrong parity", PIPELINE, TURN, TURN.replace(" ^ 1", ""), "deadlock"),
    Mutant(
        "phase not flipped by tiles of the other consumer",
        PIPELINE,
        "phase ^= sum / kNumStages & 1;",
        "",
        "ping-pong.*\n *.*(race|deadlock|more than the)",
    ),
    Mutant(
        "stage not moved by tiles of the other consumer",
        PIPELINE,
        "stage_idx = sum % kNumStages;",
        "stage_idx = (sum + 1) % kNumStages;",
        "ping-pong.*\n *.*(race|deadlock|more than the|expected)",
    ),
    Mutant(
        "another group's slot of B",
        SCHEDULER,
        "arguments.slots[tile.group_idx]",
        "tile.group_idx",
        "group .* expected",
    ),
    Mutant(
        "too few bytes expected",
        KERNEL,
        "kTileBytesB + (kGatherA ? 0 : kTileBytesA)",
        "kTileBytesB",
        "race: wgmma reads|deadlock",
    ),
    Mutant(
        "boxes of an MN-major B all from the first columns",
        KERNEL,
        "tile.n_tile_idx * Config::kTileN + column)",
        "tile.n_tile_idx * Config::kTileN)",
        "MN-major B.*\n *group .* expected",
    ),
    Mutant(
        "gather reads beyond the end of a row",
        KERNEL,
        "rows.row[pass] != nullptr && column < arguments_.depth",
        "rows.row[pass] != nullptr",
        "outside every tensor|expected",
    ),
    Mutant(
        "gather takes rows without gaps",
        KERNEL,
        "arguments_.row_indices[row] * arguments_.a_stride",
        "arguments_.row_indices[row] * int64_t{arguments_.depth}",
        "gather.*gaps.*\n *group .* expected",
    ),
    Mutant(
        "gather writes without swizzle",
        DESCRIPTOR,
        "(chunk_idx ^ (row_of_128_bytes & (kRowBytes / kChunkBytes - 1)))",
        "chunk_idx",
        "gather.*\n *group .* expected",
    ),
    Mutant(
        "descriptor with the wrong stride",
        DESCRIPTOR,
        "kLeadingBytes, 8 * swizzle_row_bytes(kSwizzle)",
        "kLeadingBytes, 4 * swizzle_row_bytes(kSwizzle)",
        "group .* expected",
    ),
    Mutant("descriptor without swizzle", DESCRIPTOR, "| mode << 62", "| mode << 63 << 1", "swizzle mode 0"),
    Mutant("rows beyond the group stored", EPILOGUE, "if (is_valid && own_column", "if (own_column", "outside the out"),
    Mutant(
        "columns beyond the last stored",
        EPILOGUE,
        "is_valid && own_column < num_columns)\n        *",
        "is_valid)\n        *",
        "outside the output|expected",
    ),
    Mutant(
        "words exchanged with the wrong lane", EPILOGUE, "words[i | step], step)", "words[i | step], step ^ 3)", "expe"
    ),
    Mutant(
        "the lower word kept where the higher is sent",
        EPILOGUE,
        "has_bit ? words[i] : words[i | step]",
        "has_bit ? words[i | step] : words[i]",
        "expected",
    ),
    Mutant(
        "weight of the next row", EPILOGUE, "is_valid ? weight[row]", "is_valid ? weight[row ^ 1]", "bias.*\n.*expected"
    ),
    Mutant("bias of the wrong column", EPILOGUE, "8 * i + 2 * position.quad_lane);", "8 * i);", "bias.*\n.*expected"),
    Mutant("bias of the first slot", EPILOGUE, "position.slot * bias_stride", "0 * bias_stride", "bias.*\n.*expected"),
    Mutant(
        "biases without gaps",
        EPILOGUE,
        "position.slot * bias_stride",
        "position.slot * num_columns",
        "bias.*\n.*expected",
    ),
    Mutant(
        "slots without gaps",
        ARGUMENTS,
        ".slice_stride = problem.b_slot_stride",
        ".slice_stride = 0",
        "gaps.*\n *group .* expected",
    ),
    Mutant(
        "a tile of every group left out",
        SCHEDULER,
        "if (idx_in_group < num_m_tiles * num_n_tiles_)",
        "if (idx_in_group + 1 < num_m_tiles * num_n_tiles_)",
        "expected",
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("grouped_gemm", mutant, tmp_path)
