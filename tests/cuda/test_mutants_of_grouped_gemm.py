"""Breaks the grouped GEMM of Hopper in known ways, one at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

KERNEL = "grouped_gemm_sm90/kernel.h"
DESCRIPTOR = "common/matrix_descriptor.h"
EPILOGUE = "grouped_gemm_sm90/epilogue.h"

MUTANTS = [
    Mutant(
        "consumer does not wait for the full barrier",
        KERNEL,
        "ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase);",
        "",
        "race: wgmma reads|got -?nan",
    ),
    Mutant(
        "consumer waits for the wrong phase",
        KERNEL,
        "ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase);",
        "ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase ^ 1);",
        "race: wgmma reads|got -?nan|deadlock",
    ),
    Mutant(
        "producer starts with the wrong phase",
        KERNEL,
        "ptx::mbarrier_wait(&storage_.empty_barrier[ring.stage_idx], ring.phase ^ 1);",
        "ptx::mbarrier_wait(&storage_.empty_barrier[ring.stage_idx], ring.phase);",
        "deadlock",
    ),
    Mutant(
        "producer does not wait for the empty barrier",
        KERNEL,
        "ptx::mbarrier_wait(&storage_.empty_barrier[ring.stage_idx], ring.phase ^ 1);",
        "",
        "race: wgmma reads|more than the",
    ),
    Mutant("phase never flips", KERNEL, "phase ^= 1;", "", "race: wgmma reads|deadlock|more than the"),
    Mutant(
        "stage released while wgmma still reads it",
        KERNEL,
        "ptx::wgmma_wait<1>(accumulators);",
        "ptx::wgmma_wait<2>(accumulators);",
        "race: wgmma reads",
    ),
    Mutant(
        "last stage released before its wgmma are retired",
        KERNEL,
        """            ptx::wgmma_wait<0>(accumulators);
            release_stage(ring.previous_stage_idx());
""",
        """            release_stage(ring.previous_stage_idx());
            ptx::wgmma_wait<0>(accumulators);
""",
        "race: wgmma reads",
    ),
    Mutant(
        "proxy fence before the wait instead of after it",
        KERNEL,
        """                ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase);
                // cp.async writes through the generic proxy, wgmma reads through the async proxy.
                if constexpr (Config::kGatherA) ptx::fence_async_proxy();
""",
        """                if constexpr (Config::kGatherA) ptx::fence_async_proxy();
                ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase);
""",
        "proxy: wgmma reads",
    ),
    Mutant(
        "accumulators used before the last wgmma is retired",
        KERNEL,
        "ptx::wgmma_wait<0>(accumulators);",
        "",
        "got -?nan|did not wait|race|was written while",
    ),
    Mutant(
        "no proxy fence between cp.async and wgmma",
        KERNEL,
        "if constexpr (Config::kGatherA) ptx::fence_async_proxy();",
        "",
        "proxy: wgmma reads",
    ),
    Mutant(
        "another group's slot of B",
        KERNEL,
        "arguments_.slots[tile.group_idx]",
        "tile.group_idx",
        "group .* expected",
    ),
    Mutant("no wgmma fence", KERNEL, "ptx::wgmma_fence();", "", "without wgmma_fence"),
    Mutant("no block barrier after mbarrier_init", KERNEL, "ptx::sync_block();", "", "used before mbarrier_init"),
    Mutant("barriers not published to TMA", KERNEL, "ptx::fence_mbarrier_init();", "", "has not published"),
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
    Mutant(
        "step along K half as long",
        KERNEL,
        "k_bytes = k * sizeof(Bf16)",
        "k_bytes = k",
        "group .* expected",
    ),
    Mutant(
        "too few bytes expected",
        KERNEL,
        "kTileBytesB + (Config::kGatherA ? 0 : kTileBytesA)",
        "kTileBytesB",
        "race: wgmma reads|deadlock",
    ),
    Mutant(
        "too few arrivals on the empty barrier",
        KERNEL,
        "ptx::mbarrier_init(&storage_.empty_barrier[stage_idx], Config::kNumConsumerWarps);",
        "ptx::mbarrier_init(&storage_.empty_barrier[stage_idx], Config::kNumConsumers);",
        "race: wgmma reads|more than the|deadlock",
    ),
    Mutant(
        "up box taken from the wrong rows",
        KERNEL,
        "block_idx * (arguments_.num_columns / kNumColumnBlocks)",
        "block_idx * kColumnBlockSize",
        "SwiGLU.*\n *group .* expected",
    ),
    Mutant(
        "up value taken from the neighbouring octet",
        EPILOGUE,
        "constexpr int kUp = kTileN / 4;",
        "constexpr int kUp = kTileN / 4 - 4;",
        "SwiGLU.*\n *group .* expected",
    ),
    Mutant(
        "rows beyond the group stored",
        EPILOGUE,
        "if (row >= position.row_end) continue;",
        "",
        "outside the output",
    ),
    Mutant(
        "gather reads beyond the end of a row",
        KERNEL,
        "rows.row[pass] != nullptr && column < arguments_.depth",
        "rows.row[pass] != nullptr",
        "outside every tensor",
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("grouped_gemm", mutant, tmp_path)
