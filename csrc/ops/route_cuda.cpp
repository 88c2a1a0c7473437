// Composed of the kernels of select_experts, group_pairs and gather_rows, without waiting for the device. Never run on
// a GPU so far.
#include <ATen/ops/arange.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "gather_rows.h"
#include "group_pairs.h"
#include "route.h"

namespace moetrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor gather_elements(const at::Tensor& x_N, const at::Tensor& place_N) {
    return gather_rows_cuda(x_N.reshape({-1, 1}), place_N, std::nullopt).reshape({-1});
}

}  // namespace

RouteOutputs route_cuda(const at::Tensor& logits_TE, int64_t top_k, std::string_view score,
                        const OptionalTensor& bias_E, int64_t num_null, int64_t num_groups, int64_t groups_kept,
                        std::string_view group_rule, bool renormalise, double scale, const OptionalTensor& valid_T,
                        const OptionalTensor& segment_T, int64_t num_segments) {
    const SelectOptions o = check_route(logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept, group_rule,
                                        renormalise, scale, valid_T, segment_T, num_segments);
    const auto [expert_id_TK, weight_TK, prob_sum_GE, count_GE, bad_1] =
        select_experts_cuda(logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept, group_rule, renormalise,
                            scale, valid_T, segment_T, num_segments);
    const auto [pair_N, offset_E1] = group_pairs_cuda(expert_id_TK.view({-1}), o.num_true());
    const auto token_N = at::div(pair_N, top_k, "floor");
    auto place_N = at::empty_like(pair_N);
    place_N.scatter_(0, pair_N.to(at::kLong), at::arange(pair_N.size(0), pair_N.options()));
    return {token_N,
            gather_elements(weight_TK, pair_N),
            offset_E1,
            expert_id_TK,
            place_N.view_as(expert_id_TK),
            prob_sum_GE,
            count_GE,
            bad_1};
}

at::Tensor route_backward_cuda(const at::Tensor& dweight_N, const at::Tensor& dprob_sum_GE, const at::Tensor& logits_TE,
                               const at::Tensor& expert_id_TK, const at::Tensor& place_TK, std::string_view score,
                               int64_t num_null, bool renormalise, double scale, const OptionalTensor& valid_T,
                               const OptionalTensor& segment_T) {
    check_route_backward(dweight_N, dprob_sum_GE, logits_TE, expert_id_TK, place_TK, score, num_null, renormalise,
                         scale, valid_T, segment_T);
    const auto gathered_TK = gather_elements(dweight_N.contiguous(), place_TK.view({-1})).view_as(expert_id_TK);
    const auto dweight_TK =
        at::where(at::ge(expert_id_TK, 0), gathered_TK, at::scalar_tensor(0, gathered_TK.options()));
    return select_experts_backward_cuda(dweight_TK, dprob_sum_GE, logits_TE, expert_id_TK, score, num_null, renormalise,
                                        scale, valid_T, segment_T);
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("route", &route_cuda);
    m.impl("route_backward", &route_backward_cuda);
}

}  // namespace moetrain
