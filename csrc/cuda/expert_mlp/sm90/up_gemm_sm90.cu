// Launcher of the up-projection on Hopper, sm_90a alone. Compiles with CUDA 13.
// Gate: 232 registers; HGMMA UTMALDG LDGSTS SYNCS USETMAXREG.
#include "cuda/expert_mlp/epilogues.h"
#include "cuda/expert_mlp/sm90/launch.h"
#include "cuda/grouped_gemm/sm90/arguments.h"
#include "cuda/grouped_gemm/sm90/launch_kernel.cuh"

namespace moetrain::sm90 {

using namespace experts;

namespace {

constexpr int64_t kFewColumns = 128;  // gate and up of F = 64: half a large tile

constexpr GemmShape kLargeTiles{.tile_m = 128, .tile_n = 256, .num_stages = 4, .uses_cp_async = true};
constexpr GemmShape kTilesInTurn{
    .tile_m = 128, .tile_n = 128, .num_stages = 6, .uses_cp_async = true, .schedule = Schedule::kPingPong};

template <GemmShape kShape, bool kGated>
cudaError_t launch(const UpProjection& up, int num_blocks, cudaStream_t stream) {
    using Config = GemmConfig<kShape>;
    using Epilogue = UpEpilogue<kGated>;
    const Epilogue epilogue = make_up_epilogue<kGated>(up);
    return launch_kernel<Config>(&grouped_gemm_kernel<Config, Epilogue>, make_arguments<Config>(up.product, epilogue),
                                 num_blocks, stream);
}

}  // namespace

cudaError_t launch_up_projection(const UpProjection& up, int num_blocks, cudaStream_t stream) {
    if (up.product.num_a_rows == 0 || up.product.num_groups == 0) return cudaSuccess;
    if (up.activation != Activation::kSwiglu) return launch<kLargeTiles, false>(up, num_blocks, stream);
    return up.product.num_columns <= kFewColumns ? launch<kTilesInTurn, true>(up, num_blocks, stream)
                                                 : launch<kLargeTiles, true>(up, num_blocks, stream);
}

}  // namespace moetrain::sm90
