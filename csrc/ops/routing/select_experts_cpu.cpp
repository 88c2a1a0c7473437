#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/routing/select_experts.h"
#include "ops/routing/select_tensors.h"

namespace moetrain {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_experts_cpu(
    const at::Tensor& logits_TE, int64_t top_k, std::string_view score, const OptionalTensor& bias_E, int64_t num_null,
    int64_t num_groups, int64_t groups_kept, std::string_view group_rule, bool renormalise, double scale,
    const OptionalTensor& valid_T, const OptionalTensor& segment_T, int64_t num_segments) {
    constexpr auto op = "select_experts";
    const SelectOptions o = check_select_experts(op, logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept,
                                                 group_rule, renormalise, scale, valid_T, segment_T, num_segments);
    check_segments(op, segment_T, valid_T, num_segments);
    const SelectTensors out = new_select_tensors(o, logits_TE, bias_E);
    if (out.weight_TK.scalar_type() == at::kDouble) {
        select_experts_kernel(o, select_forward_of<double>(out, logits_TE, valid_T, segment_T));
    } else {
        select_experts_kernel(o, select_forward_of<float>(out, logits_TE, valid_T, segment_T));
    }
    return {out.expert_id_TK, out.weight_TK, out.prob_sum_GE, out.count_GE, out.bad_1};
}

at::Tensor select_experts_backward_cpu(const at::Tensor& dweight_TK, const at::Tensor& dprob_sum_GE,
                                       const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
                                       std::string_view score, int64_t num_null, bool renormalise, double scale,
                                       const OptionalTensor& valid_T, const OptionalTensor& segment_T) {
    constexpr auto op = "select_experts_backward";
    const SelectOptions o = check_select_experts_backward(op, dweight_TK, dprob_sum_GE, logits_TE, expert_id_TK, score,
                                                          num_null, renormalise, scale, valid_T, segment_T);
    check_segments(op, segment_T, valid_T, o.num_segments);
    check_ids(op, expert_id_TK, o.num_true());
    auto dlogits_TE = new_empty(logits_TE.sizes(), logits_TE.options());
    const auto run = dweight_TK.scalar_type() == at::kDouble ? run_select_backward<double> : run_select_backward<float>;
    run(o, logits_TE, expert_id_TK, dweight_TK.contiguous(), std::nullopt, dprob_sum_GE.contiguous(), valid_T,
        segment_T, dlogits_TE);
    return dlogits_TE;
}

}  // namespace moetrain
