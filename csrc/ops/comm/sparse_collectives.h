// Contract of the classes SparsePlan and SparseCollectives of torch.classes.moetrain.
#pragma once
#include <string_view>

#include "comm/transfer/collectives.h"
#include "ops/common/checks.h"

namespace moetrain {

inline void check_placement_array(const char* op, const char* name, const at::Tensor& x, int64_t dim) {
    TORCH_CHECK_VALUE(x.dim() == dim && x.is_cpu(), op, ": ", name, " must have ", dim,
                      " dimension(s) and lie on the CPU, got ", x.sizes(), " on ", x.device());
    check_dtype(op, name, x, at::kInt);
    check_contiguous(op, name, x);
}

inline void check_groups(const char* op, const char* name, const at::Tensor& x, int64_t num_groups) {
    const auto* group = x.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < x.numel(); ++i)
        TORCH_CHECK_VALUE(group[i] >= 0 && group[i] < num_groups, op, ": ", name, " must be groups below ", num_groups,
                          ", got ", group[i]);
}

// The placement's arrays, checked: seats ascend and no expert is without one.
inline comm::PlacementArrays placement_arrays(const char* op, const at::Tensor& owner_ES, const at::Tensor& offset_E1,
                                              const at::Tensor& holder_Z, int64_t num_groups, int64_t num_shards) {
    check_placement_array(op, "owner_ES", owner_ES, 2);
    check_placement_array(op, "offset_E1", offset_E1, 1);
    check_placement_array(op, "holder_Z", holder_Z, 1);
    TORCH_CHECK_VALUE(num_groups >= 1 && num_shards >= 1, op, ": num_groups and num_shards must be at least 1, got ",
                      num_groups, " and ", num_shards);
    const int64_t num_experts = owner_ES.size(0);
    check_sizes(op, "offset_E1", offset_E1, {num_experts + 1}, "[E + 1]");
    check_groups(op, "owner_ES", owner_ES, num_groups);
    check_groups(op, "holder_Z", holder_Z, num_groups);
    const auto* offset = offset_E1.const_data_ptr<int32_t>();
    const auto* holder = holder_Z.const_data_ptr<int32_t>();
    TORCH_CHECK_VALUE(offset[0] == 0 && offset[num_experts] == holder_Z.size(0), op,
                      ": offset_E1 must begin at 0 and end at the number of seats, ", holder_Z.size(0), ", got ",
                      offset[0], " and ", offset[num_experts]);
    for (int64_t e = 0; e < num_experts; ++e) {
        TORCH_CHECK_VALUE(offset[e] < offset[e + 1] && offset[e + 1] <= holder_Z.size(0), op, ": expert ", e,
                          " must have a holder, got seats from ", offset[e], " to ", offset[e + 1]);
        for (int64_t z = offset[e] + 1; z < offset[e + 1]; ++z)
            TORCH_CHECK_VALUE(holder[z - 1] < holder[z], op, ": the holders of expert ", e,
                              " must ascend, each once, got ", holder[z - 1], " before ", holder[z]);
    }
    return {owner_ES.const_data_ptr<int32_t>(), offset, holder, num_experts, owner_ES.size(1), num_groups, num_shards};
}

inline comm::Viewpoint viewpoint(const char* op, int64_t rank, int64_t num_ranks, int64_t ranks_per_node,
                                 bool everywhere) {
    TORCH_CHECK_VALUE(rank >= 0 && rank < num_ranks, op, ": rank must be between 0 and ", num_ranks - 1, ", got ", rank,
                      "; pass this rank's position in the pool");
    TORCH_CHECK_VALUE(ranks_per_node >= 1, op, ": ranks_per_node must be at least 1, got ", ranks_per_node);
    check_fits_int32(op, "num_ranks", num_ranks);
    return {static_cast<int32_t>(rank), static_cast<int32_t>(std::min(ranks_per_node, num_ranks)), everywhere};
}

inline comm::Collective collective_of(const char* op, std::string_view name) {
    TORCH_CHECK_VALUE(name == "all_gather" || name == "reduce_scatter", op,
                      ": collective must be all_gather or reduce_scatter, got ", name);
    return name == "all_gather" ? comm::Collective::kAllGather : comm::Collective::kReduceScatter;
}

inline void check_chunks(const char* op, const char* name, const at::Tensor& x, int64_t rows) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == rows, op, ": ", name, " chunks must be [", rows, ", L], got ",
                      x.sizes());
    check_float(op, name, x);
    check_contiguous(op, name, x);
}

// Plan and tensors fit one another and the collectives that they are given to.
inline void check_exchange(const char* op, const comm::Site& site, const comm::SparsePlan& plan,
                           const at::Tensor& owned_CL, const at::Tensor& held_HL) {
    TORCH_CHECK_VALUE(plan.num_ranks() == site.num_ranks, op, ": the plan is for ", plan.num_ranks(),
                      " ranks but the group has ", site.num_ranks, "; plan for this group");
    TORCH_CHECK_VALUE(plan.viewpoint().rank == site.rank, op, ": the plan is for rank ", plan.viewpoint().rank,
                      " but this is rank ", site.rank, "; derive it for this rank");
    TORCH_CHECK_VALUE(plan.viewpoint().ranks_per_node == site.ranks_per_node, op, ": the plan is for nodes of ",
                      plan.viewpoint().ranks_per_node, " ranks but the collectives are for nodes of ",
                      site.ranks_per_node, "; derive it by SparseCollectives.plan");
    check_chunks(op, "owned", owned_CL, plan.routes().num_owned);
    check_chunks(op, "held", held_HL, plan.routes().num_held);
    check_same_device(op, "owned chunks", owned_CL, "held ones", held_HL);
    TORCH_CHECK_VALUE(owned_CL.size(1) == held_HL.size(1), op, ": owned and held chunks must have one length, got ",
                      owned_CL.size(1), " and ", held_HL.size(1));
}

// Gradients travel and are summed in at least float32, and go to masters that are at least as wide.
inline void check_sum_types(const char* op, at::ScalarType owned, at::ScalarType held) {
    TORCH_CHECK_VALUE(held == at::kFloat || held == at::kDouble, op,
                      ": gradients must be summed in at least float32, got ", held, "; convert them first");
    TORCH_CHECK_VALUE(owned == held || owned == at::kDouble, op, ": owned chunks must be at least as wide as ", held,
                      ", got ", owned);
}

}  // namespace moetrain
