#include "cpu/routing/group_pairs.h"
#include "ops/common/tensors.h"
#include "ops/routing/group_pairs.h"

namespace moetrain {

std::tuple<at::Tensor, at::Tensor> group_pairs_cpu(const at::Tensor& expert_id_P, int64_t num_experts) {
    check_group_pairs(expert_id_P, num_experts);
    auto pair_N = new_empty({expert_id_P.size(0)}, expert_id_P.options());
    auto offset_E1 = new_empty({num_experts + 1}, expert_id_P.options());
    const auto* expert_id = expert_id_P.const_data_ptr<int32_t>();
    const int64_t bad = group_pairs_kernel(expert_id, expert_id_P.size(0), num_experts,
                                           pair_N.mutable_data_ptr<int32_t>(), offset_E1.mutable_data_ptr<int32_t>());
    TORCH_CHECK_VALUE(bad < 0, "group_pairs: expert ids must be -1 or in [0, ", num_experts, "), got ", expert_id[bad],
                      " at position ", bad);
    return {pair_N, offset_E1};
}

}  // namespace moetrain
