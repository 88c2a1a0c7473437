#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace moetrain {

// y[i, :] = x[row[i], :] for i < *length, or i < num_rows where length is null; later rows of y are left unwritten.
// A row is `row_bytes` bytes, rows of x are `x_stride_bytes` apart, y is contiguous. The caller vouches for row[i].
cudaError_t launch_gather_rows(const void* x, int64_t x_stride_bytes, const int32_t* row, const int32_t* length,
                               void* y, int64_t num_rows, int64_t row_bytes, cudaStream_t stream);

}  // namespace moetrain
