// Heterogeneous sharding (arXiv 2502.02581, algorithm 2): which group owns which expert, over all layers together.
#pragma once
#include <utility>
#include <vector>

#include "planner/problem.h"

namespace moetrain::planner {

struct ReshardInput {
    Cluster cluster;  // slots count for nothing
    int64_t num_layers;
    int32_t num_hot;          // of each layer: those that are held widely, so that their owner's load says little
    const float* load_LE;     // pairs
    const int32_t* owner_LE;  // today's
};

// Owners that a group may have over all layers.
inline int64_t owner_capacity(const Cluster& cluster, int64_t num_layers) {
    return (cluster.num_experts * num_layers + cluster.num_groups - 1) / cluster.num_groups;
}

// A group owns E L / G experts over all layers, rounded up, and any number of one layer. Layers go by their largest
// load, in each the experts by load: those that are not hot to the least loaded node with room, and there to the least
// loaded group; when all layers are through, the hot ones to where most room is left. An expert stays where it is if
// its owner has room and no layer's highest load rises by it beyond an eighth over the mean.
class Resharder {
 public:
    explicit Resharder(const ReshardInput& in);
    void reshard(int32_t* new_owner_LE);

 private:
    void order_layers();
    void order_experts(int64_t layer);
    void own_layer(int64_t layer, int32_t* owner_E);
    void own_hot(int64_t layer, int32_t* owner_E);
    int32_t least_loaded() const;
    int32_t roomiest() const;
    void take(int32_t group, float load);

    const ReshardInput& in_;
    std::vector<int64_t> layers_;
    std::vector<int32_t> experts_;
    std::vector<int64_t> room_G_, room_N_;
    std::vector<double> load_G_, load_N_;  // of one layer
};

}  // namespace moetrain::planner
