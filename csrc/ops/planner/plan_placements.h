// Contract of plan_placements, split_placements, measure_placements and reshard_owners: where the experts of all layers
// live. L layers, E experts, G groups, N nodes of G / N consecutive groups, Z seats of a layer at most; see
// planner/problem.h. CPU alone.
#pragma once
#include <string_view>
#include <tuple>

#include "ops/common/checks.h"
#include "ops/common/fields.h"

namespace moetrain {

// Predicted or true pairs of each source node, and who owns what.
struct LayerLoads {
    at::Tensor count_LNE;  // float32, finite, not negative
    at::Tensor owner_LE;   // int32, groups
    int64_t num_groups;
    int64_t groups_per_node;
    using Fields = FieldTypes<at::Tensor, at::Tensor, int64_t, int64_t>;
};

struct PlannerChoice {
    std::string_view planner;
    int64_t slots;
    int64_t overlap_degree;
    int64_t seed;
    using Fields = FieldTypes<std::string_view, int64_t, int64_t, int64_t>;
};

struct LayerSeconds {
    double pair_s, near_row_s, far_row_s, expert_s, overlap_s;
    using Fields = FieldTypes<double, double, double, double, double>;
};

struct LayerSeats {
    at::Tensor offset_LE1, holder_LZ, weight_LZ, affinity_L3;
    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
};

// (offset_LE1, holder_LZ, weight_LZ, affinity_L3, measure_L4): per layer where each expert's seats begin, the seats'
// holders and weights (0 behind the last), (home, near, far), and of the worst group: pairs, rows inside its node, rows
// between nodes, replicas.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> plan_placements_cpu(const LayerLoads& loads,
                                                                                           const PlannerChoice& choice,
                                                                                           const LayerSeconds& seconds);

// (weight_LZ, affinity_L3, measure_L4): the holders of the seats as they are, tokens split anew as moetrain would.
std::tuple<at::Tensor, at::Tensor, at::Tensor> split_placements_cpu(const LayerLoads& loads, const LayerSeats& seats,
                                                                    const LayerSeconds& seconds);

// owner_LE that Hecate's algorithm 2 gives to counts, `num_hot` experts of each layer set aside; see planner/reshard.h.
at::Tensor reshard_owners_cpu(const LayerLoads& loads, int64_t num_hot);

// measure_L4 of given seats, as plan_placements gives it.
at::Tensor measure_placements_cpu(const LayerLoads& loads, const LayerSeats& seats);

}  // namespace moetrain
