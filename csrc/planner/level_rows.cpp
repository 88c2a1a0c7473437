#include "planner/level_rows.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "planner/weights.h"

namespace moetrain::planner {
namespace {

// How many times a seat's share is raised on a token's own node. Beyond the last, a node's tokens scatter so much over
// its own groups that all rows together become more; the search begins in the middle.
constexpr std::array<int32_t, 5> kNear = {1, 2, 3, 4, 6};
constexpr size_t kMiddle = 3;
constexpr int32_t kHomeOverNear = 128;  // a pair at home costs no row at all

constexpr float kTolerance = 0.005f;
constexpr float kCoarse = 0.015f;  // enough to compare with
constexpr int kMostIterations = 48;

}  // namespace

LevelRows::LevelRows(const Cluster& cluster) : cluster_(cluster), fill_(cluster), prices_(cluster), meter_(cluster) {}

// Fills tried_; returns its modelled seconds.
double LevelRows::weigh(int32_t near, float tolerance, const Costs& costs) {
    const int32_t home = near * kHomeOverNear;
    prices_.solve(static_cast<float>(home), static_cast<float>(near), tolerance, kMostIterations);
    quantise(prices_.weight_G(), {home, near, 1}, tried_.seats);
    tried_.measure = meter_.measure(tried_.seats);
    tried_.seconds = layer_seconds(tried_.measure, costs);
    return tried_.seconds;
}

// From the middle upwards while seconds fall; downwards where they rose at once.
int32_t LevelRows::choose_near(const Costs& costs) {
    double least = weigh(kNear[kMiddle], kCoarse, costs);
    const auto falls = [&](size_t level) {
        const double seconds = weigh(kNear[level], kCoarse, costs);
        return seconds < least ? (least = seconds, true) : false;
    };
    size_t level = kMiddle;
    while (level + 1 < kNear.size() && falls(level + 1))
        ++level;
    while (level <= kMiddle && level > 0 && falls(level - 1))
        --level;
    return kNear[level];
}

void LevelRows::plan_within(int32_t limit, const Layer& layer, const std::vector<double>& load_E, const Costs& costs,
                            Holders& holders) {
    fill_.level(layer, load_E, limit, holders);
    fill_.save_rows(layer, costs, limit, holders);
    holders.list(tried_.seats);
    prices_.begin(layer, load_E, tried_.seats);
    if (weigh(choose_near(costs), kTolerance, costs) < best_.seconds) std::swap(best_, tried_);
}

Measure LevelRows::plan(const Layer& layer, const std::vector<double>& load_E, const Costs& costs, Holders& holders,
                        Seats& seats) {
    const double hidden = costs.expert_s > 0 ? costs.overlap_s / costs.expert_s : cluster_.slots;
    const int32_t free_of_cost = static_cast<int32_t>(std::min<double>(cluster_.slots, hidden));
    best_.seconds = std::numeric_limits<double>::infinity();
    meter_.begin(layer, load_E);
    plan_within(free_of_cost, layer, load_E, costs, holders);
    if (const int32_t halfway = (free_of_cost + cluster_.slots) / 2; halfway > free_of_cost)
        plan_within(halfway, layer, load_E, costs, holders);
    if (cluster_.slots > free_of_cost) plan_within(cluster_.slots, layer, load_E, costs, holders);
    std::swap(seats, best_.seats);
    return best_.measure;
}

}  // namespace moetrain::planner
