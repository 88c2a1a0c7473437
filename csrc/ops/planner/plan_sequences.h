// Contract of plan_sequences: which ranks compute which sequences together. N sequences, I items, M ranks of all items,
// R ranks; see planner/sequences. CPU alone.
#pragma once
#include <string_view>
#include <tuple>

#include "ops/common/checks.h"
#include "ops/common/fields.h"

namespace moetrain {

struct SequenceLanes {
    std::string_view planner;
    int64_t num_ranks, block, capacity, gang;
    bool equal_rounds;
    using Fields = FieldTypes<std::string_view, int64_t, int64_t, int64_t, int64_t, bool>;
};

// (round_I, offset_I1, member_N, rank_offset_I1, rank_M, est_ms_I, rounds_R, bounds_2): items in the order of
// launching, and the lower bound and the makespan in ms. `cost_10` are PassCosts of planner/sequences/costs.h, twice.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
plan_sequences_cpu(const at::Tensor& num_tokens_N, const SequenceLanes& lanes, const at::Tensor& cost_10);

}  // namespace moetrain
