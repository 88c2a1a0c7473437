// The sums around an expert MLP's products: over a row's pairs, over the parts of a weight's gradient, over a slot's
// rows. All in fp32, in an order that depends on the lists alone. 16-byte loads; every pointer to bf16 is a multiple of
// 16 bytes, every stride and width a multiple of 8.
#pragma once

#include <cstdint>

#include "cuda/expert_mlp/sum_arguments.h"
#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/warp.h"

namespace moetrain::experts {

using namespace gemm;

constexpr int kChunkColumns = 8;  // 16 bytes

__device__ inline ptx::Words4 load_chunk(const Bf16* chunk) { return *reinterpret_cast<const ptx::Words4*>(chunk); }

__device__ inline void add_chunk(float (&sums)[kChunkColumns], const ptx::Words4& chunk, float weight) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[2 * i] += weight * low_half(chunk.word[i]);
        sums[2 * i + 1] += weight * high_half(chunk.word[i]);
    }
}

__device__ inline void store_chunk(Bf16* chunk, const float (&sums)[kChunkColumns]) {
    *reinterpret_cast<ptx::Words4*>(chunk) = {ptx::pack_bf16x2(sums[0], sums[1]), ptx::pack_bf16x2(sums[2], sums[3]),
                                              ptx::pack_bf16x2(sums[4], sums[5]), ptx::pack_bf16x2(sums[6], sums[7])};
}

// --- over a row's pairs ---

constexpr int kPairSumThreads = 128;
constexpr int kPairsInFlight = 4;

// Columns [column, column + 8) of one row.
__device__ inline void sum_pairs_of_row(const PairSumArguments& arguments, int row, int column) {
    const int end = arguments.row_begins[row + 1];
    float sums[kChunkColumns] = {};
    for (int first = arguments.row_begins[row]; first < end; first += kPairsInFlight) {
        ptx::Words4 chunks[kPairsInFlight];
#pragma unroll
        for (int i = 0; i < kPairsInFlight; ++i)
            if (first + i < end)
                chunks[i] = load_chunk(arguments.y + int64_t{arguments.pairs[first + i]} * arguments.width + column);
#pragma unroll
        for (int i = 0; i < kPairsInFlight; ++i)
            if (first + i < end) add_chunk(sums, chunks[i], 1.0f);
    }
    store_chunk(arguments.out + int64_t{row} * arguments.width + column, sums);
}

__global__ void __launch_bounds__(kPairSumThreads) pair_sum_kernel(const __grid_constant__ PairSumArguments arguments) {
    for (int row = ptx::block_idx(); row < arguments.num_rows; row += ptx::num_blocks())
        for (int column = kChunkColumns * ptx::thread_idx(); column < arguments.width;
             column += kChunkColumns * kPairSumThreads)
            sum_pairs_of_row(arguments, row, column);
}

// --- over the parts of a weight's gradient ---

constexpr int kWeightGradThreads = 128;

// The group of pair n, which lies below the last offset: the last one that begins at or before n.
__device__ inline int group_of(const WeightGradArguments& arguments, int pair) {
    int low = 0;
    int high = arguments.num_groups;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (arguments.group_offsets[middle] <= pair ? low : high) = middle;
    }
    return low;
}

// The same in every lane.
__device__ inline float bias_product(const WeightGradArguments& arguments, int pair, int lane_idx) {
    const int group_idx = group_of(arguments, pair);
    const int slot = arguments.slots == nullptr ? group_idx : arguments.slots[group_idx];
    const Bf16* dy = arguments.dy + arguments.row_indices[pair] * arguments.dy_stride;
    const Bf16* bias = arguments.bias + slot * arguments.bias_stride;
    float sum = 0;
    for (int column = kChunkColumns * lane_idx; column < arguments.width; column += kChunkColumns * 32) {
        const ptx::Words4 left = load_chunk(dy + column);
        const ptx::Words4 right = load_chunk(bias + column);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sum +=
                low_half(left.word[i]) * low_half(right.word[i]) + high_half(left.word[i]) * high_half(right.word[i]);
    }
    return ptx::sum_over_lanes<>(sum);
}

// A warp takes 32 pairs: its lanes share each bias product, then own a pair each.
__global__ void __launch_bounds__(kWeightGradThreads)
    weight_grad_kernel(const __grid_constant__ WeightGradArguments arguments) {
    const int lane_idx = ptx::thread_idx() % 32;
    const int length = arguments.group_offsets[arguments.num_groups];
    for (int first = ptx::block_idx() * kWeightGradThreads + ptx::thread_idx() / 32 * 32; first < arguments.num_pairs;
         first += ptx::num_blocks() * kWeightGradThreads) {
        const int pair = first + lane_idx;
        float sum = 0;
        for (int i = 0; pair < length && i < arguments.num_parts; ++i)
            sum += arguments.parts[int64_t{i} * arguments.num_pairs + pair];
        for (int i = 0; arguments.bias != nullptr && i < 32 && first + i < length; ++i) {
            const float product = bias_product(arguments, first + i, lane_idx);
            if (i == lane_idx) sum += product;
        }
        if (pair < arguments.num_pairs) arguments.out[pair] = sum;
    }
}

// --- over a slot's rows ---

// A block takes 64 columns of a slot; 32 threads share a column chunk's rows.
constexpr int kSlotSumRowLanes = 32;
constexpr int kSlotSumChunks = 8;
constexpr int kSlotSumThreads = kSlotSumRowLanes * kSlotSumChunks;
constexpr int kSlotSumColumns = kSlotSumChunks * kChunkColumns;
constexpr int kSlotSumSharedBytes = kSlotSumRowLanes * kSlotSumColumns * static_cast<int>(sizeof(float));

// This thread's share of columns [column, column + 8): every 32nd row of each group, groups ascending.
__device__ inline void sum_rows_of_slot(const SlotSumArguments& arguments, int slot, int row_lane, int column,
                                        float (&sums)[kChunkColumns]) {
    const bool has_lists = arguments.slot_offsets != nullptr;
    const int end = has_lists ? arguments.slot_offsets[slot + 1] : slot + 1;
    for (int i = has_lists ? arguments.slot_offsets[slot] : slot; i < end; ++i) {
        const int group_idx = has_lists ? arguments.slot_groups[i] : i;
        const int row_end = arguments.group_offsets[group_idx + 1];
        for (int row = arguments.group_offsets[group_idx] + row_lane; row < row_end; row += kSlotSumRowLanes) {
            const int source = arguments.row_indices == nullptr ? row : arguments.row_indices[row];
            add_chunk(sums, load_chunk(arguments.data + source * arguments.data_stride + column),
                      arguments.weight == nullptr ? 1.0f : arguments.weight[row]);
        }
    }
}

__global__ void __launch_bounds__(kSlotSumThreads) slot_sum_kernel(const __grid_constant__ SlotSumArguments arguments) {
    auto* shared = reinterpret_cast<float*>(ptx::dynamic_shared_memory());  // [row lanes][columns]
    const int chunk_idx = ptx::thread_idx() % kSlotSumChunks;
    const int row_lane = ptx::thread_idx() / kSlotSumChunks;
    const int blocks_per_slot = (arguments.width + kSlotSumColumns - 1) / kSlotSumColumns;
    for (int block = ptx::block_idx(); block < arguments.num_slots * blocks_per_slot; block += ptx::num_blocks()) {
        const int slot = block / blocks_per_slot;
        const int first_column = block % blocks_per_slot * kSlotSumColumns;
        const int column = first_column + chunk_idx * kChunkColumns;
        float sums[kChunkColumns] = {};
        if (column < arguments.width) sum_rows_of_slot(arguments, slot, row_lane, column, sums);
#pragma unroll
        for (int i = 0; i < kChunkColumns; ++i)
            shared[row_lane * kSlotSumColumns + chunk_idx * kChunkColumns + i] = sums[i];
        ptx::sync_block();
        if (row_lane == 0 && column < arguments.width) {
            float totals[kChunkColumns] = {};
            for (int lane = 0; lane < kSlotSumRowLanes; ++lane)
#pragma unroll
                for (int i = 0; i < kChunkColumns; ++i)
                    totals[i] += shared[lane * kSlotSumColumns + chunk_idx * kChunkColumns + i];
            store_chunk(arguments.out + int64_t{slot} * arguments.width + column, totals);
        }
        ptx::sync_block();  // shared memory is about to be overwritten
    }
}

}  // namespace moetrain::experts
