#include "cpu/routing/route.h"
#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/routing/route.h"
#include "ops/routing/select_tensors.h"

namespace moetrain {
namespace {

template <typename Acc>
RouteOutputs route_forward(const SelectOptions& o, const at::Tensor& logits_TE, const OptionalTensor& bias_E,
                           const OptionalTensor& valid_T, const OptionalTensor& segment_T) {
    const SelectTensors select = new_select_tensors(o, logits_TE, bias_E);
    const auto ints = select.expert_id_TK.options();
    auto token_N = new_empty({o.num_tokens * o.top_k}, ints);
    auto weight_N = new_empty({o.num_tokens * o.top_k}, select.weight_TK.options());
    auto offset_E1 = new_empty({o.num_true() + 1}, ints);
    auto place_TK = new_empty({o.num_tokens, o.top_k}, ints);
    route_kernel<Acc>(o, {
                             .select = select_forward_of<Acc>(select, logits_TE, valid_T, segment_T),
                             .token_N = token_N.mutable_data_ptr<int32_t>(),
                             .weight_N = weight_N.mutable_data_ptr<Acc>(),
                             .offset_E1 = offset_E1.mutable_data_ptr<int32_t>(),
                             .place_TK = place_TK.mutable_data_ptr<int32_t>(),
                         });
    return {token_N,  weight_N,           offset_E1,       select.expert_id_TK,
            place_TK, select.prob_sum_GE, select.count_GE, select.bad_1};
}

}  // namespace

RouteOutputs route_cpu(const at::Tensor& logits_TE, int64_t top_k, std::string_view score, const OptionalTensor& bias_E,
                       int64_t num_null, int64_t num_groups, int64_t groups_kept, std::string_view group_rule,
                       bool renormalise, double scale, const OptionalTensor& valid_T, const OptionalTensor& segment_T,
                       int64_t num_segments) {
    const SelectOptions o = check_route(logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept, group_rule,
                                        renormalise, scale, valid_T, segment_T, num_segments);
    check_segments("route", segment_T, valid_T, num_segments);
    const auto run = logits_TE.scalar_type() == at::kDouble ? route_forward<double> : route_forward<float>;
    return run(o, logits_TE, bias_E, valid_T, segment_T);
}

at::Tensor route_backward_cpu(const at::Tensor& dweight_N, const at::Tensor& dprob_sum_GE, const at::Tensor& logits_TE,
                              const at::Tensor& expert_id_TK, const at::Tensor& place_TK, std::string_view score,
                              int64_t num_null, bool renormalise, double scale, const OptionalTensor& valid_T,
                              const OptionalTensor& segment_T) {
    constexpr auto op = "route_backward";
    const SelectOptions o = check_route_backward(dweight_N, dprob_sum_GE, logits_TE, expert_id_TK, place_TK, score,
                                                 num_null, renormalise, scale, valid_T, segment_T);
    check_segments(op, segment_T, valid_T, o.num_segments);
    check_ids(op, expert_id_TK, o.num_true());
    check_places(op, place_TK);
    auto dlogits_TE = new_empty(logits_TE.sizes(), logits_TE.options());
    const auto run = dweight_N.scalar_type() == at::kDouble ? run_select_backward<double> : run_select_backward<float>;
    run(o, logits_TE, expert_id_TK, dweight_N.contiguous(), place_TK, dprob_sum_GE.contiguous(), valid_T, segment_T,
        dlogits_TE);
    return dlogits_TE;
}

}  // namespace moetrain
