// Row gather. Memory bound: reads and writes each output row once. Compiles for sm_80 and later with CUDA 12 and 13.
// Gate: 24 registers; LDG STG.
#include <algorithm>

#include "cuda/common/warp.cuh"
#include "cuda/rows/gather_rows.h"

namespace moetrain {
namespace {

constexpr int kThreadsPerBlock = 256;

// One block per output row; Vec is the widest load that every row's address allows.
template <typename Vec>
__global__ void __launch_bounds__(kThreadsPerBlock)
    gather_rows_kernel(const char* __restrict__ x, int64_t x_stride_bytes, const int32_t* __restrict__ row,
                       const int32_t* __restrict__ length, Vec* __restrict__ y, int64_t num_rows,
                       int64_t vecs_per_row) {
    const int64_t end = length == nullptr ? num_rows : *length;
    for (int64_t i = blockIdx.x; i < end; i += gridDim.x) {
        const Vec* src = reinterpret_cast<const Vec*>(x + row[i] * x_stride_bytes);
        Vec* dst = y + i * vecs_per_row;
        for (int64_t v = threadIdx.x; v < vecs_per_row; v += blockDim.x) {
            dst[v] = src[v];
        }
    }
}

template <typename Vec>
cudaError_t launch(const void* x, int64_t x_stride_bytes, const int32_t* row, const int32_t* length, void* y,
                   int64_t num_rows, int64_t row_bytes, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(std::min(num_rows, kMaxBlocks));
    gather_rows_kernel<Vec><<<blocks, kThreadsPerBlock, 0, stream>>>(static_cast<const char*>(x), x_stride_bytes, row,
                                                                     length, static_cast<Vec*>(y), num_rows,
                                                                     row_bytes / static_cast<int64_t>(sizeof(Vec)));
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gather_rows(const void* x, int64_t x_stride_bytes, const int32_t* row, const int32_t* length,
                               void* y, int64_t num_rows, int64_t row_bytes, cudaStream_t stream) {
    if (num_rows == 0 || row_bytes == 0) return cudaSuccess;  // a rank may receive no tokens
    const auto bits = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y) |
                      static_cast<uintptr_t>(x_stride_bytes) | static_cast<uintptr_t>(row_bytes);
    if (bits % 16 == 0) return launch<int4>(x, x_stride_bytes, row, length, y, num_rows, row_bytes, stream);
    if (bits % 4 == 0) return launch<int32_t>(x, x_stride_bytes, row, length, y, num_rows, row_bytes, stream);
    return launch<int16_t>(x, x_stride_bytes, row, length, y, num_rows, row_bytes, stream);
}

}  // namespace moetrain
