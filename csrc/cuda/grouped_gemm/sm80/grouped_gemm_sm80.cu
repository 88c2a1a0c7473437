// Launchers of the plain grouped GEMMs on Ampere and later. Compiles with CUDA 13.
// Gate: 240 registers; HMMA LDGSTS LDSM.
#include "cuda/grouped_gemm/sm80/arguments.h"
#include "cuda/grouped_gemm/sm80/launch.h"
#include "cuda/grouped_gemm/sm80/launch_kernel.cuh"

namespace moetrain::sm80 {
namespace {

// Long products hide the epilogue behind the other blocks' memory traffic; short ones need it beside the products.
constexpr int kLongDepth = 1024;

constexpr GemmShape large_tiles(Major major_b) {
    return {.tile_m = 128, .tile_n = 256, .num_stages = 4, .major_b = major_b};
}
constexpr GemmShape two_blocks(Major major_b) {
    return {.tile_m = 128, .tile_n = 128, .num_stages = 3, .blocks_per_multiprocessor = 2, .major_b = major_b};
}

template <GemmShape kShape>
cudaError_t launch(const GroupedGemmProblem& problem, const RowStore& store, int num_multiprocessors,
                   cudaStream_t stream) {
    using Config = GemmConfig<kShape>;
    const StoreEpilogue epilogue = make_store_epilogue(store, problem.num_columns);
    return launch_kernel<Config>(&grouped_gemm_kernel<Config, StoreEpilogue>, make_arguments<Config>(problem, epilogue),
                                 num_multiprocessors, stream);
}

template <Major kMajorB>
cudaError_t launch_by_depth(const GroupedGemmProblem& problem, const RowStore& store, int num_multiprocessors,
                            cudaStream_t stream) {
    if (problem.num_a_rows == 0 || problem.num_groups == 0 || problem.num_columns == 0) return cudaSuccess;
    return problem.depth >= kLongDepth ? launch<large_tiles(kMajorB)>(problem, store, num_multiprocessors, stream)
                                       : launch<two_blocks(kMajorB)>(problem, store, num_multiprocessors, stream);
}

}  // namespace

cudaError_t launch_grouped_gemm(const GroupedGemmProblem& problem, const RowStore& store, int num_multiprocessors,
                                cudaStream_t stream) {
    return launch_by_depth<Major::kK>(problem, store, num_multiprocessors, stream);
}

cudaError_t launch_grouped_gemm_mn_major(const GroupedGemmProblem& problem, const RowStore& store,
                                         int num_multiprocessors, cudaStream_t stream) {
    return launch_by_depth<Major::kMn>(problem, store, num_multiprocessors, stream);
}

}  // namespace moetrain::sm80
