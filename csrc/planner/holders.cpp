#include "planner/holders.h"

#include <algorithm>

namespace moetrain::planner {

Holders::Holders(const Cluster& cluster)
    : cluster_(cluster),
      holds_(static_cast<size_t>(cluster.num_experts) * cluster.num_groups),
      on_node_(static_cast<size_t>(cluster.num_nodes()) * cluster.num_experts),
      replicas_(cluster.num_groups),
      held_(cluster.num_groups) {}

void Holders::reset(const int32_t* owner_E) {
    for (int32_t g = 0; g < cluster_.num_groups; ++g) {
        for (const int32_t e : held_[g])
            holds_[static_cast<size_t>(g) * cluster_.num_experts + e] = 0;
        held_[g].clear();
    }
    std::fill(on_node_.begin(), on_node_.end(), uint8_t{0});
    std::fill(replicas_.begin(), replicas_.end(), 0);
    for (int32_t e = 0; e < cluster_.num_experts; ++e)
        seat(e, owner_E[e]);
}

void Holders::seat(int32_t expert, int32_t group) {
    holds_[static_cast<size_t>(group) * cluster_.num_experts + expert] = 1;
    on_node_[static_cast<size_t>(cluster_.node_of(group)) * cluster_.num_experts + expert] = 1;
    held_[group].push_back(expert);
}

void Holders::add(int32_t expert, int32_t group) {
    seat(expert, group);
    ++replicas_[group];
}

int32_t Holders::most_replicas() const { return *std::max_element(replicas_.begin(), replicas_.end()); }

// Groups in order fill each expert's seats in order.
void Holders::list(Seats& seats) {
    seats.offset_E1.assign(cluster_.num_experts + 1, 0);
    for (const auto& held : held_) {
        for (const int32_t e : held)
            ++seats.offset_E1[e + 1];
    }
    for (int32_t e = 0; e < cluster_.num_experts; ++e)
        seats.offset_E1[e + 1] += seats.offset_E1[e];
    next_.assign(seats.offset_E1.begin(), seats.offset_E1.end() - 1);
    seats.holder_Z.resize(seats.offset_E1.back());
    for (int32_t g = 0; g < cluster_.num_groups; ++g) {
        for (const int32_t e : held_[g])
            seats.holder_Z[next_[e]++] = g;
    }
}

}  // namespace moetrain::planner
