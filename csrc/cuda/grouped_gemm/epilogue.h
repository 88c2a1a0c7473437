// What a thread does with its accumulators: their layout, that of mma.sync m16n8 and of a warp's part of wgmma, and
// rows of bf16 to and from it.
//
// An epilogue says how many column blocks of B fill one tile (kNumColumnBlocks): with 2, the tile holds the same
// columns of B's first and second half, gate and up, so that one thread holds both values of a pair.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/common/bf16.h"
#include "cuda/grouped_gemm/problem.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/warp.h"

namespace moetrain::gemm {

// Where the accumulators of one thread belong, of the 16 rows of its warp: a thread has rows `row` and `row + 8`, and
// of every eight columns from `column` on the two from 2 * quad_lane on.
struct FragmentPosition {
    int row;
    int row_end;  // rows from here on belong to others
    int column;   // of the tile's first accumulator
    int quad_lane;
    int part_idx;  // of the matrix's columns: what the thread's warp has differs from that of every other part
    int slot;      // of B
};

// `warp_row` is the first of the warp's 16 rows.
__device__ inline FragmentPosition fragment_position(int warp_row, int row_end, int column, int part_idx, int slot) {
    const int lane_idx = ptx::thread_idx() % 32;
    return {warp_row + lane_idx / 4, row_end, column, lane_idx % 4, part_idx, slot};
}

// A thread works on 32 columns of a row at a time: of four octets, two columns each, two bf16 to a word.
constexpr int kColumnsPerStep = 32;
constexpr int kWordsPerStep = 4;
using Words = uint32_t[kWordsPerStep];

__device__ inline float low_half(uint32_t word) { return std::bit_cast<float>(word << 16); }
__device__ inline float high_half(uint32_t word) { return std::bit_cast<float>(word & 0xFFFF0000); }
__device__ inline float to_float(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Transposes the 4 x 4 words of four neighbouring lanes: from two columns of each of four octets to the whole octet
// numbered as the lane, 16 bytes, and back. All lanes of the warp take part.
__device__ inline void transpose_quad(Words& words, int quad_lane) {
#pragma unroll
    for (int step = 1; step < kWordsPerStep; step *= 2) {
        const bool has_bit = (quad_lane & step) != 0;
#pragma unroll
        for (int i = 0; i < kWordsPerStep; ++i) {
            if ((i & step) != 0) continue;
            const uint32_t received = ptx::shuffle_xor(has_bit ? words[i] : words[i | step], step);
            if (has_bit)
                words[i] = received;
            else
                words[i | step] = received;
        }
    }
}

// Stores the words of columns [column, column + 32) of a row of `num_columns`, a multiple of 8; nothing if not
// `is_valid`. All lanes of the warp take part.
__device__ inline void store_columns(Bf16* row, int column, int num_columns, bool is_valid, int quad_lane,
                                     Words& words) {
    transpose_quad(words, quad_lane);
    const int own_column = column + 8 * quad_lane;
    if (is_valid && own_column < num_columns)
        *reinterpret_cast<ptx::Words4*>(row + own_column) = {words[0], words[1], words[2], words[3]};
}

// The reverse; what is not there is 0.
__device__ inline void load_columns(const Bf16* row, int column, int num_columns, bool is_valid, int quad_lane,
                                    Words& words) {
    const int own_column = column + 8 * quad_lane;
    ptx::Words4 chunk{};
    if (is_valid && own_column < num_columns) chunk = *reinterpret_cast<const ptx::Words4*>(row + own_column);
#pragma unroll
    for (int i = 0; i < kWordsPerStep; ++i)
        words[i] = chunk.word[i];
    transpose_quad(words, quad_lane);
}

// The thread's accumulators of row `half` (0: row, 1: row + 8) and octet `octet`: two columns.
template <int kSize>
__device__ inline const float* pair_of(const float (&accumulators)[kSize], int half, int octet) {
    return accumulators + 4 * octet + 2 * half;
}

// out [R, N] = accumulators (+ weight of the row * bias of the slot).
struct StoreEpilogue {
    static constexpr int kNumColumnBlocks = 1;

    Bf16* out;
    int num_columns;             // N, a multiple of 8
    const Bf16* bias = nullptr;  // [slots, N], slots bias_stride apart; null: none
    int64_t bias_stride = 0;
    const float* weight = nullptr;  // [R], used with a bias

    template <int kTileN>
    __device__ void operator()(const float (&accumulators)[kTileN / 2], const FragmentPosition& position) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = position.row + 8 * half;
            const bool is_valid = row < position.row_end;
            const float row_weight = bias != nullptr && is_valid ? weight[row] : 0.0f;
            Bf16* out_row = out + static_cast<int64_t>(row) * num_columns;
#pragma unroll
            for (int step = 0; step < kTileN / kColumnsPerStep; ++step) {
                const int column = position.column + step * kColumnsPerStep;
                Words words;
#pragma unroll
                for (int i = 0; i < kWordsPerStep; ++i) {
                    const float* pair = pair_of(accumulators, half, step * kWordsPerStep + i);
                    const uint32_t own_bias = bias_word(position, column + 8 * i + 2 * position.quad_lane);
                    words[i] = ptx::pack_bf16x2(pair[0] + row_weight * low_half(own_bias),
                                                pair[1] + row_weight * high_half(own_bias));
                }
                store_columns(out_row, column, num_columns, is_valid, position.quad_lane, words);
            }
        }
    }

 private:
    __device__ uint32_t bias_word(const FragmentPosition& position, int column) const {
        if (bias == nullptr || column >= num_columns) return 0;
        return *reinterpret_cast<const uint32_t*>(bias + position.slot * bias_stride + column);
    }
};

inline StoreEpilogue make_store_epilogue(const RowStore& store, int64_t num_columns) {
    return {.out = store.out,
            .num_columns = static_cast<int>(num_columns),
            .bias = store.bias,
            .bias_stride = store.bias_stride,
            .weight = store.weight};
}

// out [R, N] fp32 = accumulators, or += them: gradients of weights summed over several calls.
struct FloatEpilogue {
    static constexpr int kNumColumnBlocks = 1;

    float* out;
    int num_columns;  // N, a multiple of 8
    bool accumulates;

    // Four lanes store 32 contiguous bytes of a row.
    template <int kTileN>
    __device__ void operator()(const float (&accumulators)[kTileN / 2], const FragmentPosition& position) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = position.row + 8 * half;
            if (row >= position.row_end) continue;
            float* out_row = out + static_cast<int64_t>(row) * num_columns;
#pragma unroll
            for (int octet = 0; octet < kTileN / 8; ++octet) {
                const int column = position.column + 8 * octet + 2 * position.quad_lane;
                if (column < num_columns) store_pair(out_row + column, pair_of(accumulators, half, octet));
            }
        }
    }

 private:
    struct alignas(8) Pair {
        float low;
        float high;
    };

    __device__ void store_pair(float* target, const float* sums) const {
        Pair pair{sums[0], sums[1]};
        if (accumulates) {
            const Pair before = *reinterpret_cast<const Pair*>(target);
            pair = {before.low + pair.low, before.high + pair.high};
        }
        *reinterpret_cast<Pair*>(target) = pair;
    }
};

}  // namespace moetrain::gemm
