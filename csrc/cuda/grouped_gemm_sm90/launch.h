#pragma once
#include <cuda_runtime_api.h>

#include "cuda/grouped_gemm_sm90/problem.h"

namespace moetrain::sm90 {

// out = A · Bᵀ by groups, see kernel.h; `num_blocks` is the number of multiprocessors. The first gathers A and stores
// silu(gate) · up, the others read A in place; the last has small tiles, for few columns. Throw std::invalid_argument
// where the problem breaks what arguments.h demands. Never run on a GPU so far.
cudaError_t launch_gathered_swiglu_gemm(const GroupedGemmProblem& problem, int num_blocks, cudaStream_t stream);
cudaError_t launch_contiguous_gemm(const GroupedGemmProblem& problem, int num_blocks, cudaStream_t stream);
cudaError_t launch_contiguous_gemm_of_small_tiles(const GroupedGemmProblem& problem, int num_blocks,
                                                  cudaStream_t stream);

}  // namespace moetrain::sm90
