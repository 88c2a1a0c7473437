// Launchers of the plain grouped GEMMs on Hopper, sm_90a alone. Compiles with CUDA 13.
// Gate: 232 registers; HGMMA UTMALDG SYNCS USETMAXREG.
#include "cuda/grouped_gemm/sm90/arguments.h"
#include "cuda/grouped_gemm/sm90/launch.h"
#include "cuda/grouped_gemm/sm90/launch_kernel.cuh"

namespace moetrain::sm90 {
namespace {

// Long products hide the epilogue behind the other blocks' memory traffic; short ones need it beside the products.
constexpr int kLongDepth = 1024;

constexpr GemmShape large_tiles(Major major_b) {
    return {.tile_m = 128, .tile_n = 256, .num_stages = 4, .major_b = major_b};
}
constexpr GemmShape tiles_in_turn(Major major_b) {
    return {.tile_m = 128, .tile_n = 192, .num_stages = 5, .major_b = major_b, .schedule = Schedule::kPingPong};
}
constexpr GemmShape gathering_tiles(Major major_b) {
    return {.tile_m = 128, .tile_n = 256, .num_stages = 4, .major_b = major_b, .uses_cp_async = true};
}

template <GemmShape kShape>
cudaError_t launch(const GroupedGemmProblem& problem, const RowStore& store, int num_blocks, cudaStream_t stream) {
    using Config = GemmConfig<kShape>;
    const StoreEpilogue epilogue = make_store_epilogue(store, problem.num_columns);
    return launch_kernel<Config>(&grouped_gemm_kernel<Config, StoreEpilogue>, make_arguments<Config>(problem, epilogue),
                                 num_blocks, stream);
}

template <Major kMajorB>
cudaError_t launch_by_depth(const GroupedGemmProblem& problem, const RowStore& store, int num_blocks,
                            cudaStream_t stream) {
    if (problem.num_a_rows == 0 || problem.num_groups == 0 || problem.num_columns == 0) return cudaSuccess;
    if (problem.row_indices != nullptr) return launch<gathering_tiles(kMajorB)>(problem, store, num_blocks, stream);
    return problem.depth >= kLongDepth ? launch<large_tiles(kMajorB)>(problem, store, num_blocks, stream)
                                       : launch<tiles_in_turn(kMajorB)>(problem, store, num_blocks, stream);
}

}  // namespace

cudaError_t launch_grouped_gemm(const GroupedGemmProblem& problem, const RowStore& store, int num_blocks,
                                cudaStream_t stream) {
    return launch_by_depth<Major::kK>(problem, store, num_blocks, stream);
}

cudaError_t launch_grouped_gemm_mn_major(const GroupedGemmProblem& problem, const RowStore& store, int num_blocks,
                                         cudaStream_t stream) {
    return launch_by_depth<Major::kMn>(problem, store, num_blocks, stream);
}

}  // namespace moetrain::sm90
