// Deterministic weighted sum of rows by destination, without floating-point atomics: count each row's pairs, scan the
// counts, drop the pairs into their row's segment in any order, rank each pair inside its segment (which restores
// ascending order), then sum. Compiles for sm_80 and later with CUDA 12 and 13.
// Gate: 40 registers; LDG.
#include <algorithm>

#include "cuda/common/warp.cuh"
#include "cuda/rows/scatter_add_rows.h"

namespace moetrain {
namespace {

constexpr int kThreadsPerBlock = 256;
constexpr int kScanThreads = 1024;

__device__ __forceinline__ int64_t true_length(const int32_t* length, int64_t num_pairs) {
    return length == nullptr ? num_pairs : *length;
}

__device__ __forceinline__ int64_t first_index() { return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; }

__device__ __forceinline__ int64_t index_step() { return gridDim.x * static_cast<int64_t>(blockDim.x); }

__global__ void __launch_bounds__(kThreadsPerBlock)
    count_kernel(const int32_t* __restrict__ row, const int32_t* __restrict__ length, int64_t num_pairs,
                 int32_t* __restrict__ count) {
    const int64_t end = true_length(length, num_pairs);
    for (int64_t n = first_index(); n < end; n += index_step())
        atomicAdd(count + row[n], 1);
}

__device__ __forceinline__ int32_t warp_inclusive_sum(int32_t value) {
    const int lane = threadIdx.x % kWarpSize;
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int32_t below = __shfl_up_sync(kWholeWarp, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// One block: start[t] = sum of count[0 .. t), start[num_rows] = all; cursor[t] = start[t] for the next kernel.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const int32_t* __restrict__ count, int64_t num_rows,
                                                            int32_t* __restrict__ start, int32_t* __restrict__ cursor) {
    __shared__ int32_t warp_sum[kScanThreads / kWarpSize];
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    int32_t carry = 0;
    for (int64_t base = 0; base < num_rows; base += kScanThreads) {
        const int64_t t = base + threadIdx.x;
        const int32_t value = t < num_rows ? count[t] : 0;
        const int32_t in_warp = warp_inclusive_sum(value);
        if (lane == kWarpSize - 1) warp_sum[warp] = in_warp;
        __syncthreads();
        if (warp == 0) warp_sum[lane] = warp_inclusive_sum(warp_sum[lane]);
        __syncthreads();
        const int32_t before_warp = warp == 0 ? 0 : warp_sum[warp - 1];
        if (t < num_rows) {
            start[t] = carry + before_warp + in_warp - value;
            cursor[t] = start[t];
        }
        carry += warp_sum[kScanThreads / kWarpSize - 1];
        __syncthreads();  // warp_sum is about to be overwritten
    }
    if (threadIdx.x == 0) start[num_rows] = carry;
}

__global__ void __launch_bounds__(kThreadsPerBlock)
    place_kernel(const int32_t* __restrict__ row, const int32_t* __restrict__ length, int64_t num_pairs,
                 int32_t* __restrict__ cursor, int32_t* __restrict__ unordered) {
    const int64_t end = true_length(length, num_pairs);
    for (int64_t n = first_index(); n < end; n += index_step()) {
        unordered[atomicAdd(cursor + row[n], 1)] = static_cast<int32_t>(n);
    }
}

// A pair's place in its segment is the number of smaller pairs there. Segments are about top-k long.
__global__ void __launch_bounds__(kThreadsPerBlock)
    rank_kernel(const int32_t* __restrict__ row, const int32_t* __restrict__ start, int64_t num_rows,
                const int32_t* __restrict__ unordered, int32_t* __restrict__ ordered) {
    const int64_t end = start[num_rows];
    for (int64_t i = first_index(); i < end; i += index_step()) {
        const int32_t pair = unordered[i];
        const int32_t segment_begin = start[row[pair]];
        const int32_t segment_end = start[row[pair] + 1];
        int32_t rank = 0;
        for (int32_t j = segment_begin; j < segment_end; ++j)
            rank += unordered[j] < pair ? 1 : 0;
        ordered[segment_begin + rank] = pair;
    }
}

// One block per row of x; a thread owns columns, so the order of its sum is that of the list.
template <typename Value, typename Sum>
__global__ void __launch_bounds__(kThreadsPerBlock)
    sum_kernel(const Value* __restrict__ y, int64_t y_stride, const Sum* __restrict__ weight,
               const int32_t* __restrict__ start, const int32_t* __restrict__ ordered, int64_t num_rows, int64_t width,
               Value* __restrict__ x) {
    for (int64_t t = blockIdx.x; t < num_rows; t += gridDim.x) {
        const int32_t begin = start[t];
        const int32_t end = start[t + 1];
        for (int64_t d = threadIdx.x; d < width; d += blockDim.x) {
            Sum sum = 0;
            for (int32_t i = begin; i < end; ++i) {
                const int64_t pair = ordered[i];
                const Sum value = load_as<Sum>(y, pair * y_stride + d);
                sum += weight == nullptr ? value : weight[pair] * value;
            }
            x[t * width + d] = static_cast<Value>(sum);
        }
    }
}

unsigned blocks_for(int64_t items, int64_t items_per_block) {
    return static_cast<unsigned>(std::min((items + items_per_block - 1) / items_per_block, kMaxBlocks));
}

template <typename Value, typename Sum>
cudaError_t launch_sum(const ScatterAddRows& args, const int32_t* start, const int32_t* ordered, cudaStream_t stream) {
    sum_kernel<Value, Sum><<<blocks_for(args.num_rows, 1), kThreadsPerBlock, 0, stream>>>(
        static_cast<const Value*>(args.y), args.y_stride, static_cast<const Sum*>(args.weight), start, ordered,
        args.num_rows, args.width, static_cast<Value*>(args.x));
    return cudaGetLastError();
}

}  // namespace

int64_t scatter_add_rows_scratch(int64_t num_pairs, int64_t num_rows) {
    return (num_rows + 1) + num_rows + num_pairs + std::max(num_pairs, num_rows);
}

cudaError_t launch_pairs_by_row(const int32_t* row, const int32_t* length, int64_t num_pairs, int64_t num_rows,
                                int32_t* scratch, PairsByRow* pairs, cudaStream_t stream) {
    int32_t* start = scratch;
    int32_t* cursor = start + num_rows + 1;
    int32_t* unordered = cursor + num_rows;
    int32_t* ordered = unordered + num_pairs;
    *pairs = {start, ordered};
    int32_t* count = ordered;  // counts are read before `ordered` is written; the scratch covers both
    const auto status = cudaMemsetAsync(count, 0, static_cast<size_t>(num_rows) * sizeof(int32_t), stream);
    if (status != cudaSuccess) return status;
    const unsigned pair_blocks = blocks_for(std::max<int64_t>(num_pairs, 1), kThreadsPerBlock);
    count_kernel<<<pair_blocks, kThreadsPerBlock, 0, stream>>>(row, length, num_pairs, count);
    scan_kernel<<<1, kScanThreads, 0, stream>>>(count, num_rows, start, cursor);
    place_kernel<<<pair_blocks, kThreadsPerBlock, 0, stream>>>(row, length, num_pairs, cursor, unordered);
    rank_kernel<<<pair_blocks, kThreadsPerBlock, 0, stream>>>(row, start, num_rows, unordered, ordered);
    return cudaGetLastError();
}

cudaError_t launch_scatter_add_rows(const ScatterAddRows& args, Element type, int32_t* scratch, cudaStream_t stream) {
    if (args.num_rows == 0 || args.width == 0) return cudaSuccess;
    PairsByRow pairs;
    const auto status =
        launch_pairs_by_row(args.row, args.length, args.num_pairs, args.num_rows, scratch, &pairs, stream);
    if (status != cudaSuccess) return status;
    switch (type) {
        case Element::kBFloat16:
            return launch_sum<__nv_bfloat16, float>(args, pairs.row_begin, pairs.pair, stream);
        case Element::kHalf:
            return launch_sum<__half, float>(args, pairs.row_begin, pairs.pair, stream);
        case Element::kFloat:
            return launch_sum<float, float>(args, pairs.row_begin, pairs.pair, stream);
        case Element::kDouble:
            return launch_sum<double, double>(args, pairs.row_begin, pairs.pair, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace moetrain
