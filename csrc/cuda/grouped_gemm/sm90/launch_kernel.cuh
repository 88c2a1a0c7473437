// Launches a kernel of this folder's kind. For .cu files only.
#pragma once

#include "cuda/grouped_gemm/launch_kernel.cuh"
#include "cuda/grouped_gemm/sm90/pipeline.h"

namespace moetrain::sm90 {

constexpr int kMaxSharedBytes = 227 * 1024;  // that a block of sm_90 can have

template <class Config, class Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), const Arguments& arguments, int num_blocks, cudaStream_t stream) {
    constexpr int kSharedBytes = sizeof(PipelineStorage<Config>);
    static_assert(kSharedBytes <= kMaxSharedBytes);
    return gemm::launch_kernel<Config::kNumThreads, kSharedBytes>(kernel, arguments, num_blocks, stream);
}

}  // namespace moetrain::sm90
