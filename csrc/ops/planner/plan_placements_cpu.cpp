#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/common/tensors.h"
#include "ops/planner/plan_placements.h"
#include "planner/level_rows.h"
#include "planner/measure.h"
#include "planner/plan.h"
#include "planner/reshard.h"

namespace moetrain {
namespace {

void check_cluster(const char* op, const LayerLoads& loads) {
    TORCH_CHECK_VALUE(loads.num_groups >= 1, op, ": num_groups must be at least 1, got ", loads.num_groups);
    TORCH_CHECK_VALUE(loads.groups_per_node >= 1 && loads.num_groups % loads.groups_per_node == 0, op,
                      ": groups_per_node must divide num_groups = ", loads.num_groups, ", got ", loads.groups_per_node);
    check_fits_int32(op, "num_groups", loads.num_groups);
}

void check_shapes(const char* op, const LayerLoads& loads) {
    const at::Tensor &count = loads.count_LNE, &owner = loads.owner_LE;
    const int64_t num_nodes = loads.num_groups / loads.groups_per_node;
    TORCH_CHECK_VALUE(count.dim() == 3 && count.size(1) == num_nodes && count.size(2) >= 1, op,
                      ": count must be [L, N, E] with N = num_groups / groups_per_node = ", num_nodes,
                      " and at least one expert, got ", count.sizes());
    check_dtype(op, "count", count, at::kFloat);
    check_contiguous(op, "count", count);
    check_dtype(op, "owner", owner, at::kInt);
    check_sizes(op, "owner", owner, {count.size(0), count.size(2)}, "[L, E]");
    check_contiguous(op, "owner", owner);
    check_fits_int32(op, "num_experts", count.size(2));
}

void check_values(const char* op, const LayerLoads& loads) {
    const int64_t num_nodes = loads.count_LNE.size(1), num_experts = loads.count_LNE.size(2);
    const float* const count = loads.count_LNE.const_data_ptr<float>();
    int all_fine = 1;  // nearly always: found without branches
    for (int64_t i = 0; i < loads.count_LNE.numel(); ++i)
        all_fine &= static_cast<int>(count[i] >= 0) & static_cast<int>(count[i] <= std::numeric_limits<float>::max());
    for (int64_t i = 0; !all_fine && i < loads.count_LNE.numel(); ++i) {
        TORCH_CHECK_VALUE(count[i] >= 0 && count[i] <= std::numeric_limits<float>::max(), op,
                          ": counts must be finite and at least 0, got ", count[i], " for layer ",
                          i / num_experts / num_nodes, ", node ", i / num_experts % num_nodes, ", expert ",
                          i % num_experts);
    }
    const int32_t* const owner = loads.owner_LE.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < loads.owner_LE.numel(); ++i) {
        TORCH_CHECK_VALUE(owner[i] >= 0 && owner[i] < loads.num_groups, op, ": owners must be groups below ",
                          loads.num_groups, ", got ", owner[i], " for layer ", i / num_experts, ", expert ",
                          i % num_experts);
    }
}

planner::Cluster cluster_of(const LayerLoads& loads, int64_t slots) {
    return {
        .num_experts = static_cast<int32_t>(loads.count_LNE.size(2)),
        .num_groups = static_cast<int32_t>(loads.num_groups),
        .groups_per_node = static_cast<int32_t>(loads.groups_per_node),
        .slots = static_cast<int32_t>(slots),
    };
}

planner::Kind check_choice(const char* op, const PlannerChoice& choice, int64_t num_experts) {
    const auto kind = planner::kind_of(choice.planner);
    TORCH_CHECK_VALUE(kind.has_value(), op, ": planner must be static, full, random, hecate or moetrain, got ",
                      choice.planner);
    TORCH_CHECK_VALUE(choice.slots >= 0 && choice.slots <= num_experts, op,
                      ": slots must be between 0 and the number of experts, ", num_experts, ", got ", choice.slots);
    TORCH_CHECK_VALUE(choice.overlap_degree >= 0, op, ": overlap_degree must be at least 0, got ",
                      choice.overlap_degree);
    check_fits_int32(op, "overlap_degree", choice.overlap_degree);
    return *kind;
}

planner::Costs check_seconds(const char* op, const LayerSeconds& seconds) {
    const double all[] = {seconds.pair_s, seconds.near_row_s, seconds.far_row_s, seconds.expert_s, seconds.overlap_s};
    for (const double each : all) {
        TORCH_CHECK_VALUE(std::isfinite(each) && each >= 0, op, ": seconds must be finite and at least 0, got ", each);
    }
    return {seconds.pair_s, seconds.near_row_s, seconds.far_row_s, seconds.expert_s, seconds.overlap_s};
}

planner::Layer layer_of(const LayerLoads& loads, int64_t layer) {
    const int64_t num_experts = loads.count_LNE.size(2);
    return {
        .count_NE = loads.count_LNE.const_data_ptr<float>() + layer * loads.count_LNE.size(1) * num_experts,
        .owner_E = loads.owner_LE.const_data_ptr<int32_t>() + layer * num_experts,
        .num_experts = static_cast<int32_t>(num_experts),
    };
}

// Copies one layer's seats out of the tensors.
void take_seats(const char* op, const LayerSeats& in, int64_t layer, int64_t num_groups, planner::Seats& seats) {
    const int64_t capacity = in.holder_LZ.size(1), num_experts = in.offset_LE1.size(1) - 1;
    const int32_t* const offset = in.offset_LE1.const_data_ptr<int32_t>() + layer * (num_experts + 1);
    const int32_t* const holder = in.holder_LZ.const_data_ptr<int32_t>() + layer * capacity;
    const int32_t* const weight = in.weight_LZ.const_data_ptr<int32_t>() + layer * capacity;
    const int32_t* const affinity = in.affinity_L3.const_data_ptr<int32_t>() + layer * 3;
    TORCH_CHECK_VALUE(offset[0] == 0 && offset[num_experts] <= capacity, op,
                      ": offsets must begin at 0 and end at most at ", capacity, ", got ", offset[0], " and ",
                      offset[num_experts], " for layer ", layer);
    for (int64_t e = 0; e < num_experts; ++e) {
        int64_t weights = 0;
        for (int32_t z = offset[e]; z < offset[e + 1]; ++z) {
            const bool ascends = z == offset[e] ? holder[z] >= 0 : holder[z] > holder[z - 1];
            TORCH_CHECK_VALUE(ascends && holder[z] < num_groups && weight[z] >= 0, op,
                              ": an expert's holders must be ascending groups below ", num_groups,
                              " with weights of at least 0, got holder ", holder[z], " with weight ", weight[z],
                              " for layer ", layer, ", expert ", e);
            weights += weight[z];
        }
        TORCH_CHECK_VALUE(weights > 0, op, ": some holder of each expert must have a weight, but none has for layer ",
                          layer, ", expert ", e);
    }
    TORCH_CHECK_VALUE(affinity[0] >= 0 && affinity[1] >= 0 && affinity[2] >= 0, op,
                      ": affinities must be at least 0, got ", affinity[0], ", ", affinity[1], " and ", affinity[2],
                      " for layer ", layer);
    seats.offset_E1.assign(offset, offset + num_experts + 1);
    seats.holder_Z.assign(holder, holder + offset[num_experts]);
    seats.weight_Z.assign(weight, weight + offset[num_experts]);
    seats.affinity = {affinity[0], affinity[1], affinity[2]};
}

void check_seats(const char* op, const LayerLoads& loads, const LayerSeats& seats) {
    const int64_t num_layers = loads.count_LNE.size(0), num_experts = loads.count_LNE.size(2);
    for (const auto& [name, list] : {std::pair<const char*, const at::Tensor&>{"offset", seats.offset_LE1},
                                     {"holder", seats.holder_LZ},
                                     {"weight", seats.weight_LZ},
                                     {"affinity", seats.affinity_L3}}) {
        check_dtype(op, name, list, at::kInt);
        check_contiguous(op, name, list);
    }
    check_sizes(op, "offset", seats.offset_LE1, {num_layers, num_experts + 1}, "[L, E + 1]");
    TORCH_CHECK_VALUE(seats.holder_LZ.dim() == 2 && seats.holder_LZ.size(0) == num_layers, op,
                      ": holder must be [L, Z] with L = ", num_layers, ", got ", seats.holder_LZ.sizes());
    check_sizes(op, "weight", seats.weight_LZ, seats.holder_LZ.sizes(), "[L, Z]");
    check_sizes(op, "affinity", seats.affinity_L3, {num_layers, 3}, "[L, 3]");
}

void write_measure(const planner::Measure& found, double* row) {
    row[0] = found.pairs, row[1] = found.near_rows, row[2] = found.far_rows, row[3] = found.replicas;
}

void check_loads(const char* op, const LayerLoads& loads) {
    check_cluster(op, loads);
    check_shapes(op, loads);
    check_values(op, loads);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> plan_placements_cpu(
    const LayerLoads& loads, const PlannerChoice& choice, const LayerSeconds& seconds) {
    constexpr auto op = "plan_placements";
    check_loads(op, loads);
    const int64_t num_layers = loads.count_LNE.size(0), num_experts = loads.count_LNE.size(2);
    const planner::Kind kind = check_choice(op, choice, num_experts);
    const planner::Cluster cluster = cluster_of(loads, choice.slots);
    const int64_t capacity = planner::seat_capacity(cluster, kind);
    check_fits_int32(op, "the number of seats of a layer", capacity);
    const auto int32 = loads.owner_LE.options();
    at::Tensor offset_LE1 = new_empty({num_layers, num_experts + 1}, int32);
    at::Tensor holder_LZ = new_empty({num_layers, capacity}, int32);
    at::Tensor weight_LZ = new_empty({num_layers, capacity}, int32);
    at::Tensor affinity_L3 = new_empty({num_layers, 3}, int32);
    at::Tensor measure_L4 = new_empty({num_layers, 4}, int32.dtype(at::kDouble));
    planner::plan_layers(
        {
            .cluster = cluster,
            .costs = check_seconds(op, seconds),
            .kind = kind,
            .overlap_degree = static_cast<int32_t>(choice.overlap_degree),
            .seed = static_cast<uint64_t>(choice.seed),
            .num_layers = num_layers,
            .count_LNE = loads.count_LNE.const_data_ptr<float>(),
            .owner_LE = loads.owner_LE.const_data_ptr<int32_t>(),
        },
        {
            .capacity = capacity,
            .offset_LE1 = offset_LE1.mutable_data_ptr<int32_t>(),
            .holder_LZ = holder_LZ.mutable_data_ptr<int32_t>(),
            .weight_LZ = weight_LZ.mutable_data_ptr<int32_t>(),
            .affinity_L3 = affinity_L3.mutable_data_ptr<int32_t>(),
            .measure_L4 = measure_L4.mutable_data_ptr<double>(),
        });
    return {offset_LE1, holder_LZ, weight_LZ, affinity_L3, measure_L4};
}

at::Tensor measure_placements_cpu(const LayerLoads& loads, const LayerSeats& seats) {
    constexpr auto op = "measure_placements";
    check_loads(op, loads);
    check_seats(op, loads, seats);
    const int64_t num_layers = loads.count_LNE.size(0);
    at::Tensor measure_L4 = new_empty({num_layers, 4}, loads.count_LNE.options().dtype(at::kDouble));
    planner::Meter meter(cluster_of(loads, 0));
    planner::Seats one;
    std::vector<double> load_E;
    for (int64_t layer = 0; layer < num_layers; ++layer) {
        take_seats(op, seats, layer, loads.num_groups, one);
        const planner::Layer counts = layer_of(loads, layer);
        planner::sum_nodes(cluster_of(loads, 0), counts, load_E);
        meter.begin(counts, load_E);
        const planner::Measure found = meter.measure(one);
        double* const row = measure_L4.mutable_data_ptr<double>() + layer * 4;
        write_measure(found, row);
    }
    return measure_L4;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> split_placements_cpu(const LayerLoads& loads, const LayerSeats& seats,
                                                                    const LayerSeconds& seconds) {
    constexpr auto op = "split_placements";
    check_loads(op, loads);
    check_seats(op, loads, seats);
    const planner::Costs costs = check_seconds(op, seconds);
    const int64_t num_layers = loads.count_LNE.size(0), capacity = seats.holder_LZ.size(1);
    at::Tensor weight_LZ = new_zeros({num_layers, capacity}, seats.weight_LZ.options());
    at::Tensor affinity_L3 = new_empty_like(seats.affinity_L3);
    at::Tensor measure_L4 = new_empty({num_layers, 4}, loads.count_LNE.options().dtype(at::kDouble));
    planner::LevelRows planner(cluster_of(loads, 0));
    planner::Seats one;
    std::vector<double> load_E;
    for (int64_t layer = 0; layer < num_layers; ++layer) {
        take_seats(op, seats, layer, loads.num_groups, one);
        const planner::Layer counts = layer_of(loads, layer);
        planner::sum_nodes(cluster_of(loads, 0), counts, load_E);
        write_measure(planner.split_anew(counts, load_E, costs, one),
                      measure_L4.mutable_data_ptr<double>() + layer * 4);
        std::copy(one.weight_Z.begin(), one.weight_Z.end(), weight_LZ.mutable_data_ptr<int32_t>() + layer * capacity);
        int32_t* const affinity = affinity_L3.mutable_data_ptr<int32_t>() + layer * 3;
        affinity[0] = one.affinity.home, affinity[1] = one.affinity.near, affinity[2] = one.affinity.far;
    }
    return {weight_LZ, affinity_L3, measure_L4};
}

at::Tensor reshard_owners_cpu(const LayerLoads& loads, int64_t num_hot) {
    constexpr auto op = "reshard_owners";
    check_loads(op, loads);
    const int64_t num_layers = loads.count_LNE.size(0), num_experts = loads.count_LNE.size(2);
    TORCH_CHECK_VALUE(num_hot >= 0 && num_hot <= num_experts, op,
                      ": num_hot must be between 0 and the number of experts, ", num_experts, ", got ", num_hot);
    const planner::Cluster cluster = cluster_of(loads, 0);
    std::vector<float> load_LE;
    std::vector<double> load_E;
    for (int64_t layer = 0; layer < num_layers; ++layer) {
        planner::sum_nodes(cluster, layer_of(loads, layer), load_E);
        load_LE.insert(load_LE.end(), load_E.begin(), load_E.end());
    }
    at::Tensor owner_LE = new_empty_like(loads.owner_LE);
    const planner::ReshardInput in{
        .cluster = cluster,
        .num_layers = num_layers,
        .num_hot = static_cast<int32_t>(num_hot),
        .load_LE = load_LE.data(),
        .owner_LE = loads.owner_LE.const_data_ptr<int32_t>(),
    };
    planner::Resharder(in).reshard(owner_LE.mutable_data_ptr<int32_t>());
    return owner_LE;
}

}  // namespace moetrain
