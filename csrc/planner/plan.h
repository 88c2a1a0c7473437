// The placements of all layers, one after the other, in the calling thread.
#pragma once
#include <optional>
#include <string_view>

#include "planner/measure.h"
#include "planner/problem.h"

namespace moetrain::planner {

enum class Kind { kStatic, kFull, kRandom, kHecate, kMoetrain };

inline std::optional<Kind> kind_of(std::string_view name) {
    if (name == "static") return Kind::kStatic;
    if (name == "full") return Kind::kFull;
    if (name == "random") return Kind::kRandom;
    if (name == "hecate") return Kind::kHecate;
    if (name == "moetrain") return Kind::kMoetrain;
    return std::nullopt;
}

// Seats of a layer at most.
inline int64_t seat_capacity(const Cluster& cluster, Kind kind) {
    const int64_t experts = cluster.num_experts, groups = cluster.num_groups;
    if (kind == Kind::kFull) return experts * groups;
    if (kind == Kind::kStatic) return experts;
    return experts + groups * cluster.slots;
}

struct PlanInput {
    Cluster cluster;
    Costs costs;
    Kind kind;
    int32_t overlap_degree;  // of hecate
    uint64_t seed;           // of random
    int64_t num_layers;
    const float* count_LNE;
    const int32_t* owner_LE;
};

struct PlanOutput {
    int64_t capacity;
    int32_t* offset_LE1;
    int32_t* holder_LZ;  // zero behind each layer's seats, and so are weights
    int32_t* weight_LZ;
    int32_t* affinity_L3;
    double* measure_L4;
};

void plan_layers(const PlanInput& in, const PlanOutput& out);

}  // namespace moetrain::planner
