// The operator's CUDA side as an operator on CPU tensors: every launch runs under emulation before it returns.
#include "ops/expert_mlp_cuda.cpp"

TORCH_LIBRARY(moetrain_emulated, m) {
    m.def(
        "expert_mlp(Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, Tensor w_in, Tensor w_out, "
        "Tensor? slot_E, Tensor? b_in, Tensor? b_out, str activation, bool save_h) -> (Tensor, Tensor)",
        &moetrain::expert_mlp_cuda);
    m.def(
        "expert_mlp_backward(Tensor dy_RD, Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, "
        "Tensor w_in, Tensor w_out, Tensor? slot_E, Tensor? b_in, Tensor? b_out, Tensor? h, str activation) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        &moetrain::expert_mlp_backward_cuda);
}
