// Launcher of the gradient of the hidden rows on Hopper (sm_90a). Compiles with CUDA 13.
// Gate: 232 registers; HGMMA UTMALDG LDGSTS SYNCS USETMAXREG.
#include "cuda/expert_mlp/epilogues.h"
#include "cuda/expert_mlp/sm90/launch.h"
#include "cuda/grouped_gemm/sm90/arguments.h"
#include "cuda/grouped_gemm/sm90/launch_kernel.cuh"

namespace moetrain::sm90 {

using namespace experts;

namespace {

// The epilogue loads H and stores as much again: it runs beside the other consumer's products.
using Config = GemmConfig<GemmShape{.tile_m = 128,
                                    .tile_n = 128,
                                    .num_stages = 6,
                                    .major_b = Major::kMn,
                                    .uses_cp_async = true,
                                    .schedule = Schedule::kPingPong}>;

template <bool kGated>
cudaError_t launch(const HiddenGrad& grad, int num_blocks, cudaStream_t stream) {
    using Epilogue = HiddenGradEpilogue<kGated>;
    const Epilogue epilogue = make_hidden_grad_epilogue<kGated>(grad);
    return launch_kernel<Config>(&grouped_gemm_kernel<Config, Epilogue>, make_arguments<Config>(grad.product, epilogue),
                                 num_blocks, stream);
}

}  // namespace

int num_weight_grad_parts(int64_t hidden) { return static_cast<int>((hidden + Config::kTileN - 1) / Config::kTileN); }

cudaError_t launch_hidden_grad(const HiddenGrad& grad, int num_blocks, cudaStream_t stream) {
    if (grad.product.num_a_rows == 0 || grad.product.num_groups == 0) return cudaSuccess;
    return grad.activation == Activation::kSwiglu ? launch<true>(grad, num_blocks, stream)
                                                  : launch<false>(grad, num_blocks, stream);
}

}  // namespace moetrain::sm90
