// Launches a kernel of this folder's kind: as many blocks as the multiprocessors hold together. For .cu files only.
#pragma once

#include "cuda/grouped_gemm/launch_kernel.cuh"
#include "cuda/grouped_gemm/sm80/pipeline.h"

namespace moetrain::sm80 {

// What the blocks of a multiprocessor can have together on the smallest, sm_86 and sm_89, of which each takes one KiB
// for itself.
constexpr int kMaxSharedBytes = 100 * 1024;
constexpr int kReservedBytes = 1024;

template <class Config, class Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), const Arguments& arguments, int num_multiprocessors,
                          cudaStream_t stream) {
    constexpr int kSharedBytes = sizeof(PipelineStorage<Config>);
    static_assert(Config::kBlocksPerMultiprocessor * (kSharedBytes + kReservedBytes) <= kMaxSharedBytes);
    return gemm::launch_kernel<Config::kNumThreads, kSharedBytes>(
        kernel, arguments, Config::kBlocksPerMultiprocessor * num_multiprocessors, stream);
}

}  // namespace moetrain::sm80
