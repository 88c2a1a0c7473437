#include "planner/plan.h"

#include <algorithm>

#include "planner/hecate.h"
#include "planner/holders.h"
#include "planner/level_rows.h"
#include "planner/simple.h"
#include "planner/weights.h"

namespace moetrain::planner {
namespace {

class LayerPlanner {
 public:
    explicit LayerPlanner(const PlanInput& in)
        : in_(in), holders_(in.cluster), hecate_(in.cluster), level_rows_(in.cluster), meter_(in.cluster) {}

    Measure plan(const Layer& layer, int64_t layer_idx, Seats& seats) {
        sum_nodes(in_.cluster, layer, load_E_);
        if (in_.kind == Kind::kMoetrain) return level_rows_.plan(layer, load_E_, in_.costs, holders_, seats);
        if (in_.kind == Kind::kFull) {
            plan_full(in_.cluster, seats);
        } else {
            holders_.reset(layer.owner_E);
            if (in_.kind == Kind::kRandom) {
                plan_random(in_.cluster, in_.seed + 0x100000000u * static_cast<uint64_t>(layer_idx), holders_, seats);
            } else {
                if (in_.kind == Kind::kHecate) hecate_.plan(load_E_, in_.overlap_degree, holders_);
                holders_.list(seats);
                weigh_evenly(seats);
            }
        }
        meter_.begin(layer, load_E_);
        return meter_.measure(seats);
    }

 private:
    const PlanInput& in_;
    Holders holders_;
    Hecate hecate_;
    LevelRows level_rows_;
    Meter meter_;
    std::vector<double> load_E_;
};

void write(const Seats& seats, const Measure& measure, int64_t layer, const PlanOutput& out) {
    std::copy(seats.offset_E1.begin(), seats.offset_E1.end(), out.offset_LE1 + layer * seats.offset_E1.size());
    const auto pad = [&](const std::vector<int32_t>& from, int32_t* to) {
        std::fill(std::copy(from.begin(), from.end(), to), to + out.capacity, 0);
    };
    pad(seats.holder_Z, out.holder_LZ + layer * out.capacity);
    pad(seats.weight_Z, out.weight_LZ + layer * out.capacity);
    const int32_t affinity[] = {seats.affinity.home, seats.affinity.near, seats.affinity.far};
    std::copy(std::begin(affinity), std::end(affinity), out.affinity_L3 + layer * 3);
    const double measures[] = {measure.pairs, measure.near_rows, measure.far_rows, measure.replicas};
    std::copy(std::begin(measures), std::end(measures), out.measure_L4 + layer * 4);
}

}  // namespace

void plan_layers(const PlanInput& in, const PlanOutput& out) {
    LayerPlanner planner(in);
    Seats seats;
    const int64_t num_experts = in.cluster.num_experts;
    for (int64_t layer = 0; layer < in.num_layers; ++layer) {
        const Layer one{
            .count_NE = in.count_LNE + layer * in.cluster.num_nodes() * num_experts,
            .owner_E = in.owner_LE + layer * num_experts,
            .num_experts = in.cluster.num_experts,
        };
        write(seats, planner.plan(one, layer, seats), layer, out);
    }
}

}  // namespace moetrain::planner
