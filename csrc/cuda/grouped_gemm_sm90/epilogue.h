// What a consumer thread does with its accumulators.
//
// An epilogue says how many column blocks of B fill one tile (kNumColumnBlocks): with 2, the tile holds the same
// columns of B's first and second half, gate and up, so that one thread holds both values of a pair.
#pragma once

#include <cstdint>

#include "cuda/common/bf16.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/math.h"

namespace moetrain::sm90 {

// The 2 x (columns / 4) accumulators of one thread: rows `row` and `row + 8`, and from `column` on two columns of
// every eight (the fragment layout of wgmma).
struct FragmentPosition {
    int row;
    int row_end;
    int column;
};

// Position of thread `thread_idx` (0 to 127) of a warpgroup whose 64-row tile starts at (row_begin, column_begin).
__device__ inline FragmentPosition fragment_position(int thread_idx, int row_begin, int row_end, int column_begin) {
    const int lane_idx = thread_idx % 32;
    return {row_begin + thread_idx / 32 * 16 + lane_idx / 4, row_end, column_begin + lane_idx % 4 * 2};
}

// out [R, N] = accumulators.
struct StoreEpilogue {
    static constexpr int kNumColumnBlocks = 1;

    Bf16* out;
    int num_columns;  // N, even

    template <int kTileN>
    __device__ void operator()(const float (&accumulators)[kTileN / 2], const FragmentPosition& position) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = position.row + 8 * half;
            if (row >= position.row_end) continue;
            Bf16* out_row = out + static_cast<int64_t>(row) * num_columns;
#pragma unroll
            for (int octet = 0; octet < kTileN / 8; ++octet) {
                const int column = position.column + 8 * octet;
                const float* pair = accumulators + 4 * octet + 2 * half;
                if (column < num_columns)
                    *reinterpret_cast<uint32_t*>(out_row + column) = ptx::pack_bf16x2(pair[0], pair[1]);
            }
        }
    }
};

// out [R, F] = silu(gate) * up, with gate the first F columns of the product and up the last F.
struct SwigluEpilogue {
    static constexpr int kNumColumnBlocks = 2;

    Bf16* out;
    int num_columns;  // F, even

    template <int kTileN>
    __device__ void operator()(const float (&accumulators)[kTileN / 2], const FragmentPosition& position) const {
        constexpr int kUp = kTileN / 4;  // accumulators of the gate half
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = position.row + 8 * half;
            if (row >= position.row_end) continue;
            Bf16* out_row = out + static_cast<int64_t>(row) * num_columns;
#pragma unroll
            for (int octet = 0; octet < kTileN / 16; ++octet) {
                const int column = position.column + 8 * octet;
                const float* gate = accumulators + 4 * octet + 2 * half;
                const float* up = gate + kUp;
                if (column < num_columns)
                    *reinterpret_cast<uint32_t*>(out_row + column) =
                        ptx::pack_bf16x2(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
            }
        }
    }

 private:
    __device__ static float silu(float x) { return ptx::fast_divide(x, 1.0f + ptx::fast_exp(-x)); }
};

}  // namespace moetrain::sm90
