"""Breaks the small kernels of the emulation's tests, one way at a time, and requires each break to be noticed.

They stand for what users of TMA stores, MN-major wgmma, stmatrix, cp.async groups, mma.sync and named barriers forget.
"""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

TRANSPOSED = "kernels/transposed_gemm.h"
WARP = "kernels/warp_gemm.h"
PING_PONG = "kernels/ping_pong.h"
DESCRIPTOR = "common/matrix_descriptor.h"

MUTANTS = [
    Mutant(
        "no proxy fence before the TMA store",
        TRANSPOSED,
        "ptx::fence_async_proxy();",
        "",
        "proxy: a TMA store reads",
    ),
    Mutant(
        "no barrier between stmatrix and the TMA store",
        TRANSPOSED,
        "        ptx::fence_async_proxy();\n        ptx::sync_block();\n",
        "        ptx::fence_async_proxy();\n",
        "TMA store (reads|has yet)|row .* expected",
    ),
    Mutant(
        "staging written before the last store has read it",
        TRANSPOSED,
        "if (ptx::thread_idx() == 0) ptx::bulk_wait_read<0>();\n        ptx::sync_block();",
        "ptx::sync_block();",
        "has yet to read it",
    ),
    Mutant(
        "others do not wait for the thread that waits for the store",
        TRANSPOSED,
        "if (ptx::thread_idx() == 0) ptx::bulk_wait_read<0>();\n        ptx::sync_block();",
        "if (ptx::thread_idx() == 0) ptx::bulk_wait_read<0>();",
        "has yet to read it|row .* expected|TMA store reads",
    ),
    Mutant(
        "one group too many left in flight",
        TRANSPOSED,
        "ptx::bulk_wait_read<0>();\n        ptx::sync_block();",
        "ptx::bulk_wait_read<1>();\n        ptx::sync_block();",
        "has yet to read it",
    ),
    Mutant(
        "store not committed",
        TRANSPOSED,
        "ptx::bulk_commit();",
        "",
        "has yet to read it|stores from shared memory",
    ),
    Mutant(
        "block ends while its store reads",
        TRANSPOSED,
        "    __device__ void finish() {\n        if (ptx::thread_idx() == 0) ptx::bulk_wait_read<0>();",
        "    __device__ void finish() {",
        "stores from shared memory",
    ),
    Mutant(
        "store to the wrong columns",
        TRANSPOSED,
        "column + 64 * block);",
        "column + 32 * block);",
        "row .* expected",
    ),
    Mutant(
        "staging without swizzle",
        TRANSPOSED,
        "swizzled_chunk_offset(tile_row, chunk_idx % 8)",
        "tile_row * 128 + chunk_idx % 8 * 16",
        "row .* expected",
    ),
    Mutant(
        "matrices of stmatrix in another order",
        TRANSPOSED,
        "const int tile_row = 16 * warp_idx + lane_idx % 16;",
        "const int tile_row = 16 * warp_idx + (lane_idx ^ 8) % 16;",
        "row .* expected",
    ),
    Mutant(
        "halves of a fragment swapped",
        TRANSPOSED,
        "accumulators[4 * octet + 2 * i], accumulators[4 * octet + 2 * i + 1]",
        "accumulators[4 * octet + 2 * i + 1], accumulators[4 * octet + 2 * i]",
        "row .* expected",
    ),
    Mutant(
        "operands taken for K-major",
        TRANSPOSED,
        "ptx::wgmma<Config::kTileJ, Major::kMn, Major::kMn>",
        "ptx::wgmma<Config::kTileJ, Major::kK, Major::kMn>",
        "row .* expected",
    ),
    Mutant(
        "B taken for K-major",
        TRANSPOSED,
        "ptx::wgmma<Config::kTileJ, Major::kMn, Major::kMn>",
        "ptx::wgmma<Config::kTileJ, Major::kMn, Major::kK>",
        "row .* expected",
    ),
    Mutant(
        "step of one atom along K",
        TRANSPOSED,
        "kStepBytes = 16 * kRowBytes",
        "kStepBytes = 8 * kRowBytes",
        "row .* expected|the tile must start",
    ),
    Mutant(
        "blocks of an operand closer than they are",
        TRANSPOSED,
        "kOperandBlockBytes = Config::kTileK * kRowBytes",
        "kOperandBlockBytes = Config::kTileK * kRowBytes / 2",
        "row .* expected",
    ),
    Mutant(
        "strides of a descriptor exchanged",
        DESCRIPTOR,
        "static_cast<uint64_t>(leading_bytes >> 4) << 16 |\n           static_cast<uint64_t>(stride_bytes >> 4) << 32",
        "static_cast<uint64_t>(leading_bytes >> 4) << 32 |\n           static_cast<uint64_t>(stride_bytes >> 4) << 16",
        "row .* expected",
    ),
    Mutant(
        "a swizzle's mode one off",
        DESCRIPTOR,
        ": 4 - static_cast<uint64_t>(swizzle)",
        ": static_cast<uint64_t>(swizzle)",
        "row .* expected|the tile must start",
    ),
    Mutant(
        "tiles loaded again while wgmma reads them",
        TRANSPOSED,
        """            ptx::wgmma_wait<0>(accumulators);
            ptx::sync_block();  // before the tiles are loaded again
""",
        """            ptx::sync_block();
            ptx::wgmma_wait<0>(accumulators);
""",
        "race: wgmma reads",
    ),
    Mutant(
        "warp GEMM does not wait for its copies",
        WARP,
        "ptx::cp_async_wait<1>();",
        "",
        "is read while a copy|row .* expected",
    ),
    Mutant(
        "warp GEMM leaves its last copies in flight",
        WARP,
        "ptx::cp_async_wait<0>();",
        "ptx::cp_async_wait<1>();",
        "is read while a copy|did not wait",
    ),
    Mutant(
        "copies not committed",
        WARP,
        "ptx::cp_async_commit();",
        "",
        "is read while a copy",
    ),
    Mutant(
        "no barrier after the wait for copies",
        WARP,
        "        ptx::sync_block();  // what the others loaded is here\n",
        "",
        "is read while a copy|row .* expected",
    ),
    Mutant(
        "stage loaded again while others read it",
        WARP,
        "        ptx::sync_block();  // the stage may be loaded again\n",
        "",
        "is read while a copy|row .* expected",
    ),
    Mutant(
        "B loaded without transposing",
        WARP,
        "ptx::ldmatrix_x4<true>(b",
        "ptx::ldmatrix_x4(b",
        "B transposed.*\n *row .* expected",
    ),
    Mutant(
        "quarters of A in another order",
        WARP,
        "(16 * warp_idx + lane_idx % 16) * kWarpGemmPadded + lane_idx / 16 * 8",
        "(16 * warp_idx + lane_idx / 16 * 8 + lane_idx % 8) * kWarpGemmPadded + lane_idx / 8 % 2 * 8",
        "row .* expected",
    ),
    Mutant(
        "halves of B's depth swapped",
        WARP,
        "ptx::mma_m16n8k16(sums[0], a, b[0], b[1]);",
        "ptx::mma_m16n8k16(sums[0], a, b[1], b[0]);",
        "row .* expected",
    ),
    Mutant(
        "rows of the result eight off",
        WARP,
        "lane_idx / 4 + 8 * half;",
        "lane_idx / 4 + 8 * (1 - half);",
        "row .* expected",
    ),
    Mutant(
        "a turn taken without waiting",
        PING_PONG,
        "ptx::sync_named_barrier(own_barrier, kPingPongPair);",
        "",
        "turn .* expected|is left with|is entered|deadlock",
    ),
    Mutant(
        "the other warpgroup never let go",
        PING_PONG,
        "            if (turn + 1 < num_turns) ptx::arrive_named_barrier(other_barrier, kPingPongPair);\n",
        "",
        "deadlock",
    ),
    Mutant(
        "first turn not allowed",
        PING_PONG,
        "if (warpgroup_idx == 1) ptx::arrive_named_barrier(other_barrier, kPingPongPair);",
        "",
        "deadlock",
    ),
    Mutant(
        "arrival on one's own barrier",
        PING_PONG,
        "if (turn + 1 < num_turns) ptx::arrive_named_barrier(other_barrier",
        "if (turn + 1 < num_turns) ptx::arrive_named_barrier(own_barrier",
        "deadlock|turn .* expected",
    ),
    Mutant(
        "a barrier of one warpgroup",
        PING_PONG,
        "ptx::sync_named_barrier(own_barrier, kPingPongPair);",
        "ptx::sync_named_barrier(own_barrier, 128);",
        "is entered with|turn .* expected|is left with",
    ),
    Mutant(
        "the other warpgroup let go before the turn is over",
        PING_PONG,
        """                *turns_taken += 1;
            }
            if (turn + 1 < num_turns) ptx::arrive_named_barrier(other_barrier, kPingPongPair);
""",
        """            }
            if (turn + 1 < num_turns) ptx::arrive_named_barrier(other_barrier, kPingPongPair);
            if (ptx::thread_idx() % 128 == 0) *turns_taken += 1;
""",
        "turn .* expected",
    ),
    Mutant(
        "partial sums read before all warps wrote theirs",
        PING_PONG,
        "            ptx::sync_named_barrier(3 + warpgroup_idx, 128);\n",
        "",
        "turn .* expected",
    ),
    Mutant(
        "producer keeps its registers",
        PING_PONG,
        "ptx::shrink_registers<40>();",
        "",
        "wait for 232 registers",
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("tile_kernels", mutant, tmp_path)
