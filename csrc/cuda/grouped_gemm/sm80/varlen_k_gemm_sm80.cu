// Launcher of the grouped GEMM along K on Ampere and later. Compiles with CUDA 13.
// Gate: 255 registers; HMMA LDGSTS LDSM.
#include "cuda/grouped_gemm/sm80/arguments.h"
#include "cuda/grouped_gemm/sm80/launch.h"
#include "cuda/grouped_gemm/sm80/launch_kernel.cuh"

namespace moetrain::sm80 {
namespace {

// How long the products are, the tokens decide: the epilogue runs beside another block's products in any case.
using Config = GemmConfig<GemmShape{.tile_m = 128,
                                    .tile_n = 128,
                                    .num_stages = 3,
                                    .blocks_per_multiprocessor = 2,
                                    .major_a = Major::kMn,
                                    .major_b = Major::kMn}>;

template <class Epilogue>
cudaError_t launch(const VarlenKProblem& problem, const Epilogue& epilogue, int num_multiprocessors,
                   cudaStream_t stream) {
    if (problem.num_slots == 0) return cudaSuccess;
    return launch_kernel<Config>(&varlen_k_gemm_kernel<Config, Epilogue>,
                                 make_varlen_k_arguments<Config>(problem, epilogue), num_multiprocessors, stream);
}

}  // namespace

cudaError_t launch_varlen_k_gemm(const VarlenKProblem& problem, Bf16* out, int num_multiprocessors,
                                 cudaStream_t stream) {
    return launch(problem, StoreEpilogue{.out = out, .num_columns = static_cast<int>(problem.b.width)},
                  num_multiprocessors, stream);
}

cudaError_t launch_varlen_k_gemm(const VarlenKProblem& problem, float* out, bool accumulates, int num_multiprocessors,
                                 cudaStream_t stream) {
    return launch(problem, FloatEpilogue{out, static_cast<int>(problem.b.width), accumulates}, num_multiprocessors,
                  stream);
}

}  // namespace moetrain::sm80
