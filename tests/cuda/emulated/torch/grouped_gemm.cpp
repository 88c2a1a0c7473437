// grouped_gemm's CUDA side as an operator on CPU tensors, see expert_mlp.cpp.
#include <torch/library.h>

#define MOETRAIN_TORCH_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, m) [[maybe_unused]] static void register_##name##_##key(torch::Library& m)
#include "ops/grouped_gemm/grouped_gemm_cuda.cpp"

MOETRAIN_TORCH_LIBRARY(MOETRAIN_NAMESPACE, m) {
    m.def(
        "grouped_gemm_obstacle(Tensor a_MK, Tensor b_SNK, Tensor offset_E1, Tensor? slot_E, Tensor? row_M, "
        "bool b_is_kn) -> str",
        moetrain::boxed::kernel<&moetrain::grouped_gemm_obstacle_cuda>());
    m.def(
        "grouped_gemm(Tensor a_MK, Tensor b_SNK, Tensor offset_E1, Tensor? slot_E, Tensor? row_M, bool b_is_kn) -> "
        "Tensor",
        moetrain::boxed::kernel<&moetrain::grouped_gemm_cuda>());
}
