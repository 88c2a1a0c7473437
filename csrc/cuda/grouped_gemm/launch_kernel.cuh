// Launches a kernel that has its arguments as one struct. For .cu files only.
#pragma once

#include <cuda_runtime.h>

namespace moetrain::gemm {

template <int kNumThreads, int kSharedBytes, class Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), const Arguments& arguments, int num_blocks, cudaStream_t stream) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<num_blocks, kNumThreads, kSharedBytes, stream>>>(arguments);
    return cudaGetLastError();
}

}  // namespace moetrain::gemm
