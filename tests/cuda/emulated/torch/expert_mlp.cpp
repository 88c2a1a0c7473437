// The operator's CUDA side as an operator on CPU tensors: every launch runs under emulation before it returns.
// MOETRAIN_NAMESPACE names the operators, so that a broken copy can stand beside the true one.
#include <torch/library.h>

#define MOETRAIN_TORCH_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#undef TORCH_LIBRARY_IMPL  // the file's own registration, for CUDA tensors, which nobody here has
#define TORCH_LIBRARY_IMPL(name, key, m) [[maybe_unused]] static void register_##name##_##key(torch::Library& m)
#include "ops/expert_mlp/expert_mlp_cuda.cpp"

MOETRAIN_TORCH_LIBRARY(MOETRAIN_NAMESPACE, m) {
    m.def(
        "expert_mlp(Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, Tensor w_in, Tensor w_out, "
        "Tensor? slot_E, Tensor? b_in, Tensor? b_out, str activation, bool save_h) -> (Tensor, Tensor)",
        moetrain::boxed::kernel<&moetrain::expert_mlp_cuda>());
    m.def(
        "expert_mlp_backward(Tensor dy_RD, Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, "
        "Tensor w_in, Tensor w_out, Tensor? slot_E, Tensor? b_in, Tensor? b_out, Tensor? h, str activation) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        moetrain::boxed::kernel<&moetrain::expert_mlp_backward_cuda>());
}
