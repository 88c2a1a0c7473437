// Contract of group_pairs: a stable counting sort of (token, choice) pairs by expert.
#pragma once
#include <tuple>

#include "ops/common/checks.h"

namespace moetrain {

inline void check_group_pairs(const at::Tensor& expert_id_P, int64_t num_experts) {
    constexpr auto op = "group_pairs";
    TORCH_CHECK_VALUE(expert_id_P.dim() == 1, op, ": expert_id must be [P], got ", expert_id_P.sizes(),
                      "; flatten it with .view(-1)");
    check_dtype(op, "expert_id", expert_id_P, at::kInt);
    check_fits_int32(op, "the number of pairs", expert_id_P.size(0));
    check_contiguous(op, "expert_id", expert_id_P);
    TORCH_CHECK_VALUE(num_experts >= 0, op, ": num_experts must be at least 0, got ", num_experts);
    check_fits_int32(op, "num_experts + 1", num_experts + 1);
}

// (pair_N, offset_E1), N = P. pair_N[offset_E1[e] : offset_E1[e + 1]] are expert e's positions in P, ascending;
// positions whose id is -1 follow offset_E1[E], ascending too.
std::tuple<at::Tensor, at::Tensor> group_pairs_cpu(const at::Tensor& expert_id_P, int64_t num_experts);
std::tuple<at::Tensor, at::Tensor> group_pairs_cuda(const at::Tensor& expert_id_P, int64_t num_experts);

}  // namespace moetrain
