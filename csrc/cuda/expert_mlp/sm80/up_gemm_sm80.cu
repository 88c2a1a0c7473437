// Launcher of the up-projection on Ampere and later. Compiles with CUDA 13.
// Gate: 240 registers; HMMA LDGSTS LDSM.
#include "cuda/expert_mlp/epilogues.h"
#include "cuda/expert_mlp/sm80/launch.h"
#include "cuda/grouped_gemm/sm80/arguments.h"
#include "cuda/grouped_gemm/sm80/launch_kernel.cuh"

namespace moetrain::sm80 {

using namespace experts;

namespace {

constexpr int64_t kFewColumns = 128;  // gate and up of F = 64: half a large tile

constexpr GemmShape kLargeTiles{.tile_m = 128, .tile_n = 256, .num_stages = 4};
constexpr GemmShape kTwoBlocks{.tile_m = 128, .tile_n = 128, .num_stages = 3, .blocks_per_multiprocessor = 2};

template <GemmShape kShape, bool kGated>
cudaError_t launch(const UpProjection& up, int num_multiprocessors, cudaStream_t stream) {
    using Config = GemmConfig<kShape>;
    const UpEpilogue<kGated> epilogue = make_up_epilogue<kGated>(up);
    return launch_kernel<Config>(&grouped_gemm_kernel<Config, UpEpilogue<kGated>>,
                                 make_arguments<Config>(up.product, epilogue), num_multiprocessors, stream);
}

}  // namespace

cudaError_t launch_up_projection(const UpProjection& up, int num_multiprocessors, cudaStream_t stream) {
    if (up.product.num_a_rows == 0 || up.product.num_groups == 0) return cudaSuccess;
    if (up.activation != Activation::kSwiglu) return launch<kLargeTiles, false>(up, num_multiprocessors, stream);
    return up.product.num_columns <= kFewColumns ? launch<kTwoBlocks, true>(up, num_multiprocessors, stream)
                                                 : launch<kLargeTiles, true>(up, num_multiprocessors, stream);
}

}  // namespace moetrain::sm80
