// Launcher of the gradient of the hidden rows on Ampere and later. Compiles with CUDA 13.
// Gate: 248 registers; HMMA LDGSTS LDSM.
#include "cuda/expert_mlp/epilogues.h"
#include "cuda/expert_mlp/sm80/launch.h"
#include "cuda/grouped_gemm/sm80/arguments.h"
#include "cuda/grouped_gemm/sm80/launch_kernel.cuh"

namespace moetrain::sm80 {

using namespace experts;

namespace {

// The epilogue loads H and stores as much again: it runs beside another block's products.
using Config = GemmConfig<GemmShape{
    .tile_m = 128, .tile_n = 128, .num_stages = 3, .blocks_per_multiprocessor = 2, .major_b = Major::kMn}>;

template <bool kGated>
cudaError_t launch(const HiddenGrad& grad, int num_multiprocessors, cudaStream_t stream) {
    const HiddenGradEpilogue<kGated> epilogue = make_hidden_grad_epilogue<kGated>(grad);
    return launch_kernel<Config>(&grouped_gemm_kernel<Config, HiddenGradEpilogue<kGated>>,
                                 make_arguments<Config>(grad.product, epilogue), num_multiprocessors, stream);
}

}  // namespace

int num_weight_grad_parts(int64_t hidden) {
    return static_cast<int>((hidden + Config::kTileN - 1) / Config::kTileN * Config::kWarpsN);
}

cudaError_t launch_hidden_grad(const HiddenGrad& grad, int num_multiprocessors, cudaStream_t stream) {
    if (grad.product.num_a_rows == 0 || grad.product.num_groups == 0) return cudaSuccess;
    return grad.activation == Activation::kSwiglu ? launch<true>(grad, num_multiprocessors, stream)
                                                  : launch<false>(grad, num_multiprocessors, stream);
}

}  // namespace moetrain::sm80
