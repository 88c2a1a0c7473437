#pragma once
#include <cuda_runtime_api.h>

#include "cuda/grouped_gemm/problem.h"

namespace moetrain::sm80 {

// Grouped GEMMs of rows in place or gathered. The tile follows from the matrices' sizes alone, never from the number of
// rows. No rows, groups or columns: nothing to do. Throw std::invalid_argument where the problem breaks what
// arguments.h demands. `num_multiprocessors` is the device's.
cudaError_t launch_grouped_gemm(const gemm::GroupedGemmProblem& problem, const gemm::RowStore& store,
                                int num_multiprocessors, cudaStream_t stream);
// B is [slots, depth, num_columns].
cudaError_t launch_grouped_gemm_mn_major(const gemm::GroupedGemmProblem& problem, const gemm::RowStore& store,
                                         int num_multiprocessors, cudaStream_t stream);

// out [slots, width of a, width of b] = sums over each slot's rows; every slot is written.
cudaError_t launch_varlen_k_gemm(const gemm::VarlenKProblem& problem, Bf16* out, int num_multiprocessors,
                                 cudaStream_t stream);
// The same in fp32; with `accumulates`, added to what `out` holds.
cudaError_t launch_varlen_k_gemm(const gemm::VarlenKProblem& problem, float* out, bool accumulates,
                                 int num_multiprocessors, cudaStream_t stream);

}  // namespace moetrain::sm80
