// The CUDA side of router, token rounding and seats as operators on CPU tensors: every launch runs under emulation
// before it returns. MOETRAIN_NAMESPACE names the operators, so that a broken copy can stand beside the true one.
#include <torch/library.h>

#define MOETRAIN_TORCH_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define MOETRAIN_JOIN(a, b) a##b
#define MOETRAIN_REGISTRATION(count) MOETRAIN_JOIN(register_, count)
#undef TORCH_LIBRARY_IMPL  // the files' own registrations, for CUDA tensors, which nobody here has
#define TORCH_LIBRARY_IMPL(name, key, m) \
    [[maybe_unused]] static void MOETRAIN_REGISTRATION(__COUNTER__)(torch::Library & m)
#include "ops/rounding/round_pairs_cuda.cpp"
#include "ops/routing/assign_seats_cuda.cpp"
#include "ops/routing/group_pairs_cuda.cpp"
#include "ops/routing/route_cuda.cpp"
#include "ops/routing/select_experts_cuda.cpp"

MOETRAIN_TORCH_LIBRARY(MOETRAIN_NAMESPACE, m) {
    m.def(
        "route(Tensor logits_TE, int top_k, str score, Tensor? bias_E, int num_null, int num_groups, "
        "int groups_kept, str group_rule, bool renormalise, float scale, Tensor? valid_T, Tensor? segment_T, "
        "int num_segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        moetrain::boxed::kernel<&moetrain::route_cuda>());
    m.def(
        "route_backward(Tensor dweight_N, Tensor dprob_sum_GE, Tensor logits_TE, Tensor expert_id_TK, "
        "Tensor place_TK, str score, int num_null, bool renormalise, float scale, Tensor? valid_T, "
        "Tensor? segment_T) -> Tensor",
        moetrain::boxed::kernel<&moetrain::route_backward_cuda>());
    m.def(
        "offer_pairs(Tensor score_TE, Tensor token_N, Tensor offset_E1, Tensor token_gid_T2, Tensor? valid_T, "
        "int tile) -> (Tensor, Tensor)",
        moetrain::boxed::kernel<&moetrain::offer_pairs_cuda>());
    m.def(
        "round_pairs(Tensor score_TE, Tensor token_N, Tensor offset_E1, Tensor offers_WEX, Tensor offer_token_E2M, "
        "Tensor? holder_WE, int rank, int tile, str rule, int key) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        moetrain::boxed::kernel<&moetrain::round_pairs_cuda>());
    m.def(
        "assign_seats(Tensor token_N, Tensor offset_E1, int num_tokens, Tensor seat_offset_E1, Tensor holder_Z, "
        "Tensor share_Z, int num_groups, int source, int domain_size) -> (Tensor, Tensor)",
        moetrain::boxed::kernel<&moetrain::assign_seats_cuda>());
}
