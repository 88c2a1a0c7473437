// A small user of cp.async groups, ldmatrix and mma.sync: out [M, N] = A [M, K] · B, bf16 in, fp32 out; B is [N, K], or
// [K, N] when kTransposeB. One warp of a block owns 16 rows, all see a tile of 16 columns; two stages.
#pragma once

#include <cstdint>

#include "cuda/common/bf16.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shared.h"

namespace moetrain::test {

struct WarpGemmArguments {
    const Bf16* a;
    const Bf16* b;
    float* out;
    int num_rows;     // M
    int num_columns;  // N, a multiple of 16
    int depth;        // K, a multiple of 16
};

constexpr int kWarpGemmThreads = 64;
constexpr int kWarpGemmRows = kWarpGemmThreads / 32 * 16;
constexpr int kWarpGemmSide = 16;    // columns and depth of a step
constexpr int kWarpGemmPadded = 24;  // elements from row to row: 48 bytes keep eight rows off one bank

struct WarpGemmStorage {
    alignas(16) Bf16 a[2][kWarpGemmRows * kWarpGemmPadded];
    alignas(16) Bf16 b[2][kWarpGemmSide * kWarpGemmPadded];
};

template <bool kTransposeB>
__device__ void load_step(const WarpGemmArguments& args, WarpGemmStorage& storage, int row, int column, int k) {
    const int stage = k / kWarpGemmSide % 2;
    const int tile_row = ptx::thread_idx() / 2;
    const int chunk = ptx::thread_idx() % 2 * 8;
    const bool is_valid = row + tile_row < args.num_rows;
    ptx::cp_async_16_bytes(storage.a[stage] + tile_row * kWarpGemmPadded + chunk,
                           is_valid ? args.a + static_cast<int64_t>(row + tile_row) * args.depth + k + chunk : args.a,
                           is_valid);
    if (tile_row < kWarpGemmSide) {
        const int64_t at = kTransposeB ? static_cast<int64_t>(k + tile_row) * args.num_columns + column
                                       : static_cast<int64_t>(column + tile_row) * args.depth + k;
        ptx::cp_async_16_bytes(storage.b[stage] + tile_row * kWarpGemmPadded + chunk, args.b + at + chunk, true);
    }
    ptx::cp_async_commit();
}

template <bool kTransposeB>
__device__ void multiply_step(const WarpGemmStorage& storage, int stage, float (&sums)[2][4]) {
    const int warp_idx = ptx::thread_idx() / 32;
    const int lane_idx = ptx::thread_idx() % 32;
    uint32_t a[4];
    uint32_t b[4];
    // Quarters of A in the order of mma's words: rows first.
    ptx::ldmatrix_x4(a, storage.a[stage] + (16 * warp_idx + lane_idx % 16) * kWarpGemmPadded + lane_idx / 16 * 8);
    // Quarters of B: both halves of k for the first eight columns, then for the next.
    if constexpr (kTransposeB)
        ptx::ldmatrix_x4<true>(b, storage.b[stage] + lane_idx % 16 * kWarpGemmPadded + lane_idx / 16 * 8);
    else
        ptx::ldmatrix_x4(
            b, storage.b[stage] + (lane_idx / 16 * 8 + lane_idx % 8) * kWarpGemmPadded + lane_idx / 8 % 2 * 8);
    ptx::mma_m16n8k16(sums[0], a, b[0], b[1]);
    ptx::mma_m16n8k16(sums[1], a, b[2], b[3]);
}

template <bool kTransposeB>
__global__ void __launch_bounds__(kWarpGemmThreads) warp_gemm_kernel(const WarpGemmArguments args) {
    auto& storage = *reinterpret_cast<WarpGemmStorage*>(ptx::dynamic_shared_memory());
    const int num_row_tiles = (args.num_rows + kWarpGemmRows - 1) / kWarpGemmRows;
    const int row = ptx::block_idx() % num_row_tiles * kWarpGemmRows;
    const int column = ptx::block_idx() / num_row_tiles * kWarpGemmSide;
    float sums[2][4] = {};
    load_step<kTransposeB>(args, storage, row, column, 0);
    for (int k = 0; k < args.depth; k += kWarpGemmSide) {
        if (k + kWarpGemmSide < args.depth) {
            load_step<kTransposeB>(args, storage, row, column, k + kWarpGemmSide);
            ptx::cp_async_wait<1>();
        } else {
            ptx::cp_async_wait<0>();
        }
        ptx::sync_block();  // what the others loaded is here
        multiply_step<kTransposeB>(storage, k / kWarpGemmSide % 2, sums);
        ptx::sync_block();  // the stage may be loaded again
    }
    const int lane_idx = ptx::thread_idx() % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int out_row = row + ptx::thread_idx() / 32 * 16 + lane_idx / 4 + 8 * half;
        if (out_row >= args.num_rows) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int out_column = column + i / 2 * 8 + lane_idx % 4 * 2 + i % 2;
            args.out[static_cast<int64_t>(out_row) * args.num_columns + out_column] = sums[i / 2][2 * half + i % 2];
        }
    }
}

}  // namespace moetrain::test
