// Who holds what while the plan of a layer grows.
#pragma once
#include <vector>

#include "planner/problem.h"

namespace moetrain::planner {

class Holders {
 public:
    explicit Holders(const Cluster& cluster);

    // Owners alone; every slot is free.
    void reset(const int32_t* owner_E);
    // A replica, in one of the group's slots.
    void add(int32_t expert, int32_t group);
    // Offsets and holders. Weights are left to whoever knows them.
    void list(Seats& seats);

    bool holds(int32_t expert, int32_t group) const {
        return holds_[static_cast<size_t>(group) * cluster_.num_experts + expert] != 0;
    }
    bool is_on_node(int32_t expert, int32_t node) const { return experts_on(node)[expert] != 0; }
    // 1 for each expert with a seat on the node, else 0.
    const uint8_t* experts_on(int32_t node) const {
        return on_node_.data() + static_cast<size_t>(node) * cluster_.num_experts;
    }
    int32_t replicas(int32_t group) const { return replicas_[group]; }
    int32_t most_replicas() const;
    const std::vector<int32_t>& held_by(int32_t group) const { return held_[group]; }

 private:
    void seat(int32_t expert, int32_t group);

    Cluster cluster_;
    std::vector<uint8_t> holds_;              // [G, E]
    std::vector<uint8_t> on_node_;            // [N, E]
    std::vector<int32_t> replicas_;           // [G]
    std::vector<std::vector<int32_t>> held_;  // [G], experts as they came
    std::vector<int32_t> next_;               // [E]
};

}  // namespace moetrain::planner
