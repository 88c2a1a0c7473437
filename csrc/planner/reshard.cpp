#include "planner/reshard.h"

#include <algorithm>
#include <numeric>

namespace moetrain::planner {
namespace {

constexpr double kStaysBelow = 1.125;  // of the mean

}  // namespace

Resharder::Resharder(const ReshardInput& in)
    : in_(in),
      experts_(in.cluster.num_experts),
      room_G_(in.cluster.num_groups, owner_capacity(in.cluster, in.num_layers)),
      room_N_(in.cluster.num_nodes(), owner_capacity(in.cluster, in.num_layers) * in.cluster.groups_per_node),
      load_G_(in.cluster.num_groups),
      load_N_(in.cluster.num_nodes()) {}

void Resharder::order_layers() {
    std::vector<float> highest(in_.num_layers);
    for (int64_t layer = 0; layer < in_.num_layers; ++layer) {
        const float* const load = in_.load_LE + layer * in_.cluster.num_experts;
        highest[layer] = *std::max_element(load, load + in_.cluster.num_experts);
    }
    layers_.resize(in_.num_layers);
    std::iota(layers_.begin(), layers_.end(), 0);
    std::stable_sort(layers_.begin(), layers_.end(), [&](int64_t a, int64_t b) { return highest[a] > highest[b]; });
}

void Resharder::order_experts(int64_t layer) {
    const float* const load = in_.load_LE + layer * in_.cluster.num_experts;
    std::iota(experts_.begin(), experts_.end(), 0);
    std::stable_sort(experts_.begin(), experts_.end(), [&](int32_t a, int32_t b) { return load[a] > load[b]; });
}

int32_t Resharder::least_loaded() const {
    int32_t node = -1, group = -1;
    for (int32_t n = 0; n < in_.cluster.num_nodes(); ++n) {
        if (room_N_[n] > 0 && (node < 0 || load_N_[n] < load_N_[node])) node = n;
    }
    for (int32_t g = in_.cluster.first_of(node); g < in_.cluster.first_of(node + 1); ++g) {
        if (room_G_[g] > 0 && (group < 0 || load_G_[g] < load_G_[group])) group = g;
    }
    return group;
}

int32_t Resharder::roomiest() const {
    return static_cast<int32_t>(std::max_element(room_G_.begin(), room_G_.end()) - room_G_.begin());
}

void Resharder::take(int32_t group, float load) {
    const int32_t node = in_.cluster.node_of(group);
    --room_G_[group], --room_N_[node];
    load_G_[group] += load, load_N_[node] += load;
}

void Resharder::own_layer(int64_t layer, int32_t* owner_E) {
    const float* const load = in_.load_LE + layer * in_.cluster.num_experts;
    const int32_t* const today = in_.owner_LE + layer * in_.cluster.num_experts;
    order_experts(layer);
    std::fill(load_G_.begin(), load_G_.end(), 0.0);
    std::fill(load_N_.begin(), load_N_.end(), 0.0);
    double mean = 0;
    for (int32_t i = in_.num_hot; i < in_.cluster.num_experts; ++i)
        mean += load[experts_[i]];
    mean /= in_.cluster.num_groups;
    for (int32_t i = in_.num_hot; i < in_.cluster.num_experts; ++i) {
        const int32_t e = experts_[i], best = least_loaded();
        const double allowed = std::max(load_G_[best] + load[e], kStaysBelow * mean);
        const bool stays = room_G_[today[e]] > 0 && load_G_[today[e]] + load[e] <= allowed;
        owner_E[e] = stays ? today[e] : best;
        take(owner_E[e], load[e]);
    }
}

void Resharder::own_hot(int64_t layer, int32_t* owner_E) {
    const int32_t* const today = in_.owner_LE + layer * in_.cluster.num_experts;
    order_experts(layer);
    for (int32_t i = 0; i < in_.num_hot; ++i) {
        const int32_t e = experts_[i];
        owner_E[e] = room_G_[today[e]] > 0 ? today[e] : roomiest();
        take(owner_E[e], 0);
    }
}

void Resharder::reshard(int32_t* new_owner_LE) {
    order_layers();
    for (const int64_t layer : layers_)
        own_layer(layer, new_owner_LE + layer * in_.cluster.num_experts);
    for (const int64_t layer : layers_)
        own_hot(layer, new_owner_LE + layer * in_.cluster.num_experts);
}

}  // namespace moetrain::planner
