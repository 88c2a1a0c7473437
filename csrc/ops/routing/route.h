// Contract of route: select_experts, and its pairs grouped by expert as in group_pairs, in one operator.
#pragma once
#include <tuple>

#include "ops/routing/select_experts.h"

namespace moetrain {

// (token_N, weight_N, offset_E1, expert_id_TK, place_TK, prob_sum_GE, count_GE, bad_1), N = T * K.
using RouteOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline SelectOptions check_route(const SelectInput& in) {
    constexpr auto op = "route";
    const auto options = check_select_experts(op, in);
    check_fits_int32(op, "the number of pairs (T * K)", options.num_tokens * in.top_k);
    return options;
}

inline SelectOptions check_route_backward(const SelectGradients& in, const at::Tensor& place_TK,
                                          const WeightOptions& how) {
    constexpr auto op = "route_backward";
    check_dtype(op, "place", place_TK, at::kInt);
    check_sizes(op, "place", place_TK, in.expert_id_TK.sizes(), "[T, K]");
    check_contiguous(op, "place", place_TK);
    check_same_device(op, "place", place_TK, "logits", in.logits_TE);
    check_sizes(op, "dweight", in.dweight, {in.expert_id_TK.numel()}, "[T * K]");
    SelectGradients by_token = in;
    by_token.dweight = in.dweight.view_as(in.expert_id_TK);
    return check_select_experts_backward(op, by_token, how);
}

// Places index memory: the CPU checks them always, CUDA with debugging on, on a copy.
inline void check_places(const char* op, const at::Tensor& place_TK) {
    const auto* place = place_TK.const_data_ptr<int32_t>();
    const int64_t size = place_TK.numel();
    bool inside = true;
    for (int64_t i = 0; i < size; ++i)
        inside &= (place[i] >= 0) & (place[i] < size);
    if (inside) return;
    for (int64_t i = 0; i < size; ++i) {
        TORCH_CHECK_VALUE(place[i] >= 0 && place[i] < size, op, ": places must be in [0, ", size, "), got ", place[i],
                          " at position ", i, "; pass what route gave");
    }
}

// The first five as select_experts' choices p = (token, k), in the order of group_pairs: pair n is the n-th of them by
// (expert, token), the choices of no true expert following the last expert, in their own order and with weight 0.
// token_N and weight_N are the token and the weight of each; offset_E1 is over the true experts; place_TK says which n
// each choice p became. The others are select_experts'.
RouteOutputs route_cpu(const SelectInput& in);

// d logits_TE, in the logits' dtype, from the gradients of weight_N and prob_sum_GE; what dweight_N holds beyond
// offset_E1[-1] is ignored.
at::Tensor route_backward_cpu(const SelectGradients& in, const at::Tensor& place_TK, const WeightOptions& how);

}  // namespace moetrain
