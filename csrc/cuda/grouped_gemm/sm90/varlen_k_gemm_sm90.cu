// Launcher of the grouped GEMM along K on Hopper, sm_90a alone. Compiles with CUDA 13.
// Gate: 232 registers; HGMMA UTMALDG LDGSTS SYNCS USETMAXREG.
#include "cuda/grouped_gemm/sm90/arguments.h"
#include "cuda/grouped_gemm/sm90/launch.h"
#include "cuda/grouped_gemm/sm90/launch_kernel.cuh"

namespace moetrain::sm90 {
namespace {

template <class Epilogue>
cudaError_t launch(const VarlenKProblem& problem, const Epilogue& epilogue, int num_blocks, cudaStream_t stream) {
    if (problem.num_slots == 0) return cudaSuccess;
    using Config = GemmConfig<GemmShape{.tile_m = 128,
                                        .tile_n = 256,
                                        .num_stages = 4,
                                        .major_a = Major::kMn,
                                        .major_b = Major::kMn,
                                        .uses_cp_async = true}>;
    return launch_kernel<Config>(&varlen_k_gemm_kernel<Config, Epilogue>,
                                 make_varlen_k_arguments<Config>(problem, epilogue), num_blocks, stream);
}

}  // namespace

cudaError_t launch_varlen_k_gemm(const VarlenKProblem& problem, Bf16* out, int num_blocks, cudaStream_t stream) {
    return launch(problem, StoreEpilogue{.out = out, .num_columns = static_cast<int>(problem.b.width)}, num_blocks,
                  stream);
}

cudaError_t launch_varlen_k_gemm(const VarlenKProblem& problem, float* out, bool accumulates, int num_blocks,
                                 cudaStream_t stream) {
    return launch(problem, FloatEpilogue{out, static_cast<int>(problem.b.width), accumulates}, num_blocks, stream);
}

}  // namespace moetrain::sm90
