// expert_mlp's contract as an operator of its own, on any device, for those who compose expert_mlp of other operators.

#include "ops/common/debug.h"
#include "ops/common/optional.h"
#include "ops/expert_mlp/expert_mlp.h"

namespace moetrain {

// Values are read where the lists are on the CPU or MOETRAIN_DEBUG asks for it.
void check_expert_mlp_op(const at::Tensor& x_RD, const at::Tensor& row_N, const at::Tensor& weight_N,
                         const at::Tensor& offset_E1, const at::Tensor& w_in, const at::Tensor& w_out,
                         const OptionalTensor& slot_E, const OptionalTensor& b_in, const OptionalTensor& b_out,
                         std::string activation) {
    const ExpertMlp in{x_RD, row_N, weight_N, offset_E1, w_in, w_out, slot_E, b_in, b_out, std::move(activation)};
    check_expert_mlp(in);
    if (!x_RD.is_cpu() && !debug_checks()) return;
    const auto row_on_cpu = row_N.cpu();
    const auto offset_on_cpu = offset_E1.cpu();
    const auto slot_on_cpu = on_cpu(slot_E);
    check_expert_mlp_values(
        {x_RD, row_on_cpu, weight_N, offset_on_cpu, w_in, w_out, slot_on_cpu, b_in, b_out, in.activation});
}

}  // namespace moetrain
