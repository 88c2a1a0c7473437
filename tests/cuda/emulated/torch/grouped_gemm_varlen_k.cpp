// grouped_gemm_varlen_k's CUDA side as operators on CPU tensors, see expert_mlp.cpp.
#include <torch/library.h>

#define MOETRAIN_TORCH_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, m) [[maybe_unused]] static void register_##name##_##key(torch::Library& m)
#include "ops/grouped_gemm/grouped_gemm_varlen_k_cuda.cpp"

MOETRAIN_TORCH_LIBRARY(MOETRAIN_NAMESPACE, m) {
    m.def(
        "grouped_gemm_varlen_k_obstacle(Tensor a_MI, Tensor b_MJ, Tensor offset_E1, Tensor? slot_E, Tensor? row_a_M, "
        "Tensor? row_b_M, int num_slots, Tensor? out_SIJ) -> str",
        moetrain::boxed::kernel<&moetrain::grouped_gemm_varlen_k_obstacle_cuda>());
    m.def(
        "grouped_gemm_varlen_k(Tensor a_MI, Tensor b_MJ, Tensor offset_E1, Tensor? slot_E, Tensor? row_a_M, "
        "Tensor? row_b_M, int num_slots) -> Tensor",
        moetrain::boxed::kernel<&moetrain::grouped_gemm_varlen_k_cuda>());
    m.def(
        "grouped_gemm_varlen_k_(Tensor(a!) out_SIJ, Tensor a_MI, Tensor b_MJ, Tensor offset_E1, Tensor? slot_E, "
        "Tensor? row_a_M, Tensor? row_b_M) -> ()",
        moetrain::boxed::kernel<&moetrain::grouped_gemm_varlen_k_accumulate_cuda>());
}
