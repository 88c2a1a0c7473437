// expert_mlp's contract as an operator of its own, on any device, for those who compose expert_mlp of other operators.

#include "ops/common/debug.h"
#include "ops/expert_mlp/expert_mlp.h"

namespace moetrain {

// Values are read where the lists are on the CPU or MOETRAIN_DEBUG asks for it.
void check_expert_mlp_op(const ExpertMlp& in) {
    check_expert_mlp(in);
    if (in.x_RD.is_cpu() || debug_checks()) check_expert_mlp_values_on_cpu(in);
}

}  // namespace moetrain
