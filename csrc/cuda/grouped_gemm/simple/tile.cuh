// One 64x64 tile of a product, by 256 threads on ordinary FMA units: what both forms of grouped_gemm share. Right for
// every size and dtype, and simple; a tensor-core path is another file. For .cu files only.
#pragma once
#include "cuda/common/warp.cuh"

namespace moetrain {

constexpr int kTile = 64;      // rows and columns of a tile
constexpr int kDepth = 16;     // summed elements per step
constexpr int kThreads = 256;  // 16 x 16, each with a 4 x 4 part of the tile
constexpr int kPart = 4;
constexpr int kThreadsPerSide = kTile / kPart;
constexpr int kPadded = kTile + 4;  // keeps a column of the transposed store off one bank
constexpr int kLoads = kTile * kDepth / kThreads;

template <typename Acc>
struct Operands {
    Acc a[kDepth][kPadded];  // a[k][row of the tile]
    Acc b[kDepth][kPadded];  // b[k][column of the tile]
};

// sum += a^T b for the step that lies in shared memory. A thread's columns are 16 apart: neighbours read neighbours.
template <typename Acc>
__device__ __forceinline__ void multiply_step(const Operands<Acc>& in, Acc (&sum)[kPart][kPart]) {
    const int thread_row = threadIdx.x / kThreadsPerSide;
    const int thread_col = threadIdx.x % kThreadsPerSide;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
        Acc a[kPart], b[kPart];
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
            a[i] = in.a[k][thread_row * kPart + i];
            b[i] = in.b[k][thread_col + i * kThreadsPerSide];
        }
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
#pragma unroll
            for (int j = 0; j < kPart; ++j)
                sum[i][j] += a[i] * b[j];
        }
    }
}

// Calls write(row, col, sum) for the parts of the tile this thread holds.
template <typename Acc, typename Write>
__device__ __forceinline__ void write_tile(const Acc (&sum)[kPart][kPart], const Write& write) {
    const int thread_row = threadIdx.x / kThreadsPerSide;
    const int thread_col = threadIdx.x % kThreadsPerSide;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
#pragma unroll
        for (int j = 0; j < kPart; ++j)
            write(thread_row * kPart + i, thread_col + j * kThreadsPerSide, sum[i][j]);
    }
}

}  // namespace moetrain
