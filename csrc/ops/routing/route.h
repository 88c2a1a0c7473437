// Contract of route: select_experts, and its pairs grouped by expert as in group_pairs, in one operator.
#pragma once
#include <tuple>

#include "ops/routing/select_experts.h"

namespace moetrain {

// (token_N, weight_N, offset_E1, expert_id_TK, place_TK, prob_sum_GE, count_GE, bad_1), N = T * K.
using RouteOutputs =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline SelectOptions check_route(const at::Tensor& logits_TE, int64_t top_k, std::string_view score,
                                 const OptionalTensor& bias_E, int64_t num_null, int64_t num_groups,
                                 int64_t groups_kept, std::string_view group_rule, bool renormalise, double scale,
                                 const OptionalTensor& valid_T, const OptionalTensor& segment_T, int64_t num_segments) {
    constexpr auto op = "route";
    const auto options = check_select_experts(op, logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept,
                                              group_rule, renormalise, scale, valid_T, segment_T, num_segments);
    check_fits_int32(op, "the number of pairs (T * K)", options.num_tokens * top_k);
    return options;
}

inline SelectOptions check_route_backward(const at::Tensor& dweight_N, const at::Tensor& dprob_sum_GE,
                                          const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
                                          const at::Tensor& place_TK, std::string_view score, int64_t num_null,
                                          bool renormalise, double scale, const OptionalTensor& valid_T,
                                          const OptionalTensor& segment_T) {
    constexpr auto op = "route_backward";
    check_dtype(op, "place", place_TK, at::kInt);
    check_sizes(op, "place", place_TK, expert_id_TK.sizes(), "[T, K]");
    check_contiguous(op, "place", place_TK);
    check_same_device(op, "place", place_TK, "logits", logits_TE);
    check_sizes(op, "dweight", dweight_N, {expert_id_TK.numel()}, "[T * K]");
    return check_select_experts_backward(op, dweight_N.view_as(expert_id_TK), dprob_sum_GE, logits_TE, expert_id_TK,
                                         score, num_null, renormalise, scale, valid_T, segment_T);
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
RouteOutputs route_cpu(const at::Tensor& logits_TE, int64_t top_k, std::string_view score, const OptionalTensor& bias_E,
                       int64_t num_null, int64_t num_groups, int64_t groups_kept, std::string_view group_rule,
                       bool renormalise, double scale, const OptionalTensor& valid_T, const OptionalTensor& segment_T,
                       int64_t num_segments);

// d logits_TE, in the logits' dtype, from the gradients of weight_N and prob_sum_GE; what dweight_N holds beyond
// offset_E1[-1] is ignored.
at::Tensor route_backward_cpu(const at::Tensor& dweight_N, const at::Tensor& dprob_sum_GE, const at::Tensor& logits_TE,
                              const at::Tensor& expert_id_TK, const at::Tensor& place_TK, std::string_view score,
                              int64_t num_null, bool renormalise, double scale, const OptionalTensor& valid_T,
                              const OptionalTensor& segment_T);

}  // namespace moetrain
