// What a planner of placements is given, and what it gives back. Shapes: L layers, E experts, G groups, N nodes, Z
// seats.
//
// A group is the ranks that hold the shards of one expert together. `groups_per_node` consecutive groups share a node.
// A seat is (expert, holder); seats ascend by both. Of the tokens that group s has for expert e, each of e's seats gets
// a part in proportion to its share: weight * (home if s itself is the holder, else near if both are on one node, else
// far). Where all shares are 0 the weights alone count. Ties go to the lower index everywhere in this folder, and what
// decides is computed of + - * / and square roots alone, so that all machines plan alike.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moetrain::planner {

// Shares of one source for one expert sum to at most this: times a count of tokens they still fit 64 bits.
constexpr int32_t kMostShares = 1 << 24;

struct Cluster {
    int32_t num_experts;
    int32_t num_groups;
    int32_t groups_per_node;
    int32_t slots;  // replicas that a group may hold beside what it owns

    int32_t num_nodes() const { return num_groups / groups_per_node; }
    int32_t node_of(int32_t group) const { return group / groups_per_node; }
    int32_t first_of(int32_t node) const { return node * groups_per_node; }
};

// Seconds, forward and backward together.
struct Costs {
    double pair_s;      // a (token, expert) pair on a group
    double near_row_s;  // a row that stays on its node
    double far_row_s;   // a row that leaves its node
    double expert_s;    // weights and gradients of a replica
    double overlap_s;   // of those, what other work hides
};

struct Layer {
    const float* count_NE;   // predicted pairs of each source node
    const int32_t* owner_E;  // groups
    int32_t num_experts;

    float count(int32_t node, int32_t expert) const {
        return count_NE[static_cast<size_t>(node) * num_experts + expert];
    }
};

struct Affinity {
    int32_t home, near, far;
};

// Of one layer; buffers that are used again.
struct Seats {
    std::vector<int32_t> offset_E1;
    std::vector<int32_t> holder_Z;
    std::vector<int32_t> weight_Z;
    Affinity affinity{1, 1, 1};
};

}  // namespace moetrain::planner
