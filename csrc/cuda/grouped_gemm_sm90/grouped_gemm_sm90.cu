// Launchers of the grouped GEMM on Hopper, sm_90a alone. Compiles with CUDA 13; never run on a GPU so far.
// Gate: 232 registers; HGMMA UTMALDG SYNCS USETMAXREG.
#include <cuda_runtime.h>

#include "cuda/grouped_gemm_sm90/arguments.h"
#include "cuda/grouped_gemm_sm90/launch.h"

namespace moetrain::sm90 {
namespace {

constexpr int kMaxSharedBytes = 227 * 1024;  // that a block of sm_90 can have

template <class Config, class Epilogue>
cudaError_t launch(const GroupedGemmProblem& problem, int num_blocks, cudaStream_t stream) {
    if (problem.num_a_rows == 0 || problem.num_groups == 0 || problem.num_columns == 0) return cudaSuccess;
    auto* kernel = &grouped_gemm_kernel<Config, Epilogue>;
    constexpr int kSharedBytes = sizeof(GroupedGemmStorage<Config>);
    static_assert(kSharedBytes <= kMaxSharedBytes);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<num_blocks, Config::kNumThreads, kSharedBytes, stream>>>(make_arguments<Config, Epilogue>(problem));
    return cudaGetLastError();
}

using Gathered = GroupedGemmConfig</*kTileN=*/256, /*kNumConsumers=*/2, /*kNumStages=*/4, /*kGatherA=*/true>;
using Contiguous = GroupedGemmConfig</*kTileN=*/256, /*kNumConsumers=*/2, /*kNumStages=*/4, /*kGatherA=*/false>;
using Small = GroupedGemmConfig</*kTileN=*/128, /*kNumConsumers=*/1, /*kNumStages=*/4, /*kGatherA=*/false>;

}  // namespace

cudaError_t launch_gathered_swiglu_gemm(const GroupedGemmProblem& problem, int num_blocks, cudaStream_t stream) {
    return launch<Gathered, SwigluEpilogue>(problem, num_blocks, stream);
}

cudaError_t launch_contiguous_gemm(const GroupedGemmProblem& problem, int num_blocks, cudaStream_t stream) {
    return launch<Contiguous, StoreEpilogue>(problem, num_blocks, stream);
}

cudaError_t launch_contiguous_gemm_of_small_tiles(const GroupedGemmProblem& problem, int num_blocks,
                                                  cudaStream_t stream) {
    return launch<Small, StoreEpilogue>(problem, num_blocks, stream);
}

}  // namespace moetrain::sm90
