#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ops/common/tensors.h"
#include "ops/planner/plan_sequences.h"
#include "planner/sequences/planners.h"

namespace moetrain {
namespace {

constexpr auto kPlanSequences = "plan_sequences";

planner::SequenceCosts sequence_costs(const at::Tensor& cost_10) {
    check_dtype(kPlanSequences, "costs", cost_10, at::kDouble);
    check_sizes(kPlanSequences, "costs", cost_10, {10}, "5 numbers of each of two passes");
    check_contiguous(kPlanSequences, "costs", cost_10);
    planner::SequenceCosts found{};
    for (size_t pass = 0; pass < 2; ++pass) {
        const double* const c = cost_10.const_data_ptr<double>() + 5 * pass;
        for (int i = 0; i < 5; ++i)
            TORCH_CHECK_VALUE(std::isfinite(c[i]) && c[i] >= 0, kPlanSequences,
                              ": costs must be finite and at least 0, got ", c[i]);
        found.passes[pass] = {
            .square_ms = c[0], .token_ms = c[1], .item_ms = c[2], .hop_ms = c[3], .hop_token_ms = c[4]};
    }
    return found;
}

planner::SequencePlanner check_lanes(const at::Tensor& num_tokens_N, const SequenceLanes& lanes) {
    check_dtype(kPlanSequences, "num_tokens", num_tokens_N, at::kLong);
    TORCH_CHECK_VALUE(num_tokens_N.dim() == 1, kPlanSequences, ": num_tokens must be [N], got ", num_tokens_N.sizes());
    check_contiguous(kPlanSequences, "num_tokens", num_tokens_N);
    check_fits_int32(kPlanSequences, "N", num_tokens_N.numel());
    check_fits_int32(kPlanSequences, "num_ranks", lanes.num_ranks);
    TORCH_CHECK_VALUE(lanes.num_ranks >= 1, kPlanSequences, ": num_ranks must be at least 1, got ", lanes.num_ranks);
    TORCH_CHECK_VALUE(lanes.block >= 1 && lanes.num_ranks % lanes.block == 0, kPlanSequences,
                      ": block must divide num_ranks = ", lanes.num_ranks, ", got ", lanes.block);
    TORCH_CHECK_VALUE(lanes.gang >= 1 && lanes.num_ranks % lanes.gang == 0, kPlanSequences,
                      ": gang must divide num_ranks = ", lanes.num_ranks, ", got ", lanes.gang);
    TORCH_CHECK_VALUE(lanes.capacity >= 1, kPlanSequences, ": capacity must be at least 1, got ", lanes.capacity);
    const auto found = planner::sequence_planner_of(lanes.planner);
    TORCH_CHECK_VALUE(found.has_value(), kPlanSequences, ": planner must be data, context, bytescale or moetrain, got ",
                      lanes.planner);
    const auto* const n = num_tokens_N.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < num_tokens_N.numel(); ++i)
        TORCH_CHECK_VALUE(n[i] >= 1, kPlanSequences, ": sequences must have at least 1 token, got ", n[i],
                          " for sequence ", i);
    return *found;
}

template <typename T>
at::Tensor tensor_of(const std::vector<T>& values, at::ScalarType dtype, const at::Tensor& like) {
    at::Tensor made = new_empty({static_cast<int64_t>(values.size())}, like.options().dtype(dtype));
    std::copy(values.begin(), values.end(), made.mutable_data_ptr<T>());
    return made;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
plan_sequences_cpu(const at::Tensor& num_tokens_N, const SequenceLanes& lanes, const at::Tensor& cost_10) {
    const auto planner = check_lanes(num_tokens_N, lanes);
    const planner::SequenceProblem problem{
        .num_tokens = num_tokens_N.const_data_ptr<int64_t>(),
        .num_sequences = num_tokens_N.numel(),
        .num_ranks = lanes.num_ranks,
        .block = lanes.block,
        .capacity = lanes.capacity,
        .gang = lanes.gang,
        .equal_rounds = lanes.equal_rounds,
        .costs = sequence_costs(cost_10),
    };
    if (const int64_t i = planner::too_long(problem, planner); i >= 0) {
        const int64_t most = planner == planner::SequencePlanner::kData      ? 1
                             : planner == planner::SequencePlanner::kContext ? lanes.gang
                                                                             : lanes.num_ranks;
        TORCH_CHECK_VALUE(false, kPlanSequences, ": sequence ", i, " has ", problem.num_tokens[i], " tokens, but the ",
                          most, " rank(s) that may share it under planner ", lanes.planner, " hold ", lanes.capacity,
                          " each; raise the capacity, cut sequences shorter",
                          most < lanes.num_ranks ? ", or let more ranks share one" : ", or take more ranks");
    }
    const planner::SequencePlanMade made = planner::plan(problem, planner);
    const planner::SequenceItems& items = made.items;
    std::vector<int32_t> order(items.items().size()), round, member, rank;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        const auto &left = items.items()[a], &right = items.items()[b];
        return left.round != right.round ? left.round < right.round : items.ranks(left)[0] < items.ranks(right)[0];
    });
    std::vector<int64_t> offset{0}, rank_offset{0};
    std::vector<double> est_ms;
    member.reserve(items.num_members());
    rank.reserve(items.num_item_ranks());
    for (const int32_t at : order) {
        const auto& item = items.items()[at];
        round.push_back(item.round);
        member.insert(member.end(), items.members(item), items.members(item) + item.num_members);
        rank.insert(rank.end(), items.ranks(item), items.ranks(item) + item.num_ranks);
        offset.push_back(static_cast<int64_t>(member.size()));
        rank_offset.push_back(static_cast<int64_t>(rank.size()));
        est_ms.push_back(item.ms);
    }
    const std::vector<double> bounds{made.lower_bound_ms, made.makespan_ms};
    return {tensor_of(round, at::kInt, num_tokens_N),       tensor_of(offset, at::kLong, num_tokens_N),
            tensor_of(member, at::kInt, num_tokens_N),      tensor_of(rank_offset, at::kLong, num_tokens_N),
            tensor_of(rank, at::kInt, num_tokens_N),        tensor_of(est_ms, at::kDouble, num_tokens_N),
            tensor_of(made.rounds, at::kInt, num_tokens_N), tensor_of(bounds, at::kDouble, num_tokens_N)};
}

}  // namespace moetrain
