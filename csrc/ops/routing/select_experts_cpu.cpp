#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/routing/select_experts.h"
#include "ops/routing/select_tensors.h"

namespace moetrain {

SelectOutputs select_experts_cpu(const SelectInput& in) {
    constexpr auto op = "select_experts";
    const SelectOptions o = check_select_experts(op, in);
    check_segments(op, in.masks, in.num_segments);
    const SelectTensors out = new_select_tensors(o, in);
    if (out.weight_TK.scalar_type() == at::kDouble) {
        select_experts_kernel(o, select_forward_of<double>(out, in));
    } else {
        select_experts_kernel(o, select_forward_of<float>(out, in));
    }
    return {out.expert_id_TK, out.weight_TK, out.prob_sum_GE, out.count_GE, out.bad_1};
}

at::Tensor select_experts_backward_cpu(const SelectGradients& in, const WeightOptions& how) {
    constexpr auto op = "select_experts_backward";
    const SelectOptions o = check_select_experts_backward(op, in, how);
    check_segments(op, how.masks, o.num_segments);
    check_ids(op, in.expert_id_TK, o.num_true());
    auto dlogits_TE = new_empty(in.logits_TE.sizes(), in.logits_TE.options());
    const auto run = in.dweight.scalar_type() == at::kDouble ? run_select_backward<double> : run_select_backward<float>;
    run(o, in, std::nullopt, how.masks, dlogits_TE);
    return dlogits_TE;
}

}  // namespace moetrain
