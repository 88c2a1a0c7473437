#include "planner/level_rows.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "planner/weights.h"

namespace moetrain::planner {
namespace {

// How many times a seat's share is raised on a token's own node. The higher, the fewer rows between nodes; but a node's
// tokens then scatter over its groups, and rows in all become more. The search begins in the middle.
constexpr std::array<int32_t, 6> kNear = {1, 2, 3, 5, 12, 32};
constexpr size_t kMiddle = 3;
constexpr double kWorthIt = 1.0 / 32;  // of seconds: a step for less would follow the noise of the worst group
// A pair at home costs no row at all. But where sources are few, what stays at home is so much that loads may not be
// levelled beside it.
constexpr std::array<int32_t, 3> kHomeOverNear = {128, 8, 1};

constexpr float kTolerance = 0.005f;
constexpr float kCoarse = 0.03f;  // enough to count rows with
constexpr float kLost = 1.01f;    // of the mean: above it loads are not levelled
constexpr int kMostIterations = 48;

Affinity affinity_at(size_t level, int32_t home_over_near) { return {kNear[level] * home_over_near, kNear[level], 1}; }

}  // namespace

LevelRows::LevelRows(const Cluster& cluster) : cluster_(cluster), fill_(cluster), prices_(cluster), meter_(cluster) {}

// Fills all of tried_ but the holders.
void LevelRows::weigh(const Affinity& affinity, const Costs& costs) {
    quantise(prices_.weight_G(), affinity, tried_.seats);
    tried_.measure = meter_.measure(tried_.seats);
    tried_.seconds = layer_seconds(tried_.measure, costs);
}

float LevelRows::solve(const Affinity& affinity, float tolerance) {
    return prices_.solve(static_cast<float>(affinity.home), static_cast<float>(affinity.near), tolerance,
                         kMostIterations);
}

// By the rows alone, at prices that nearly level loads in the middle: from there upwards while seconds fall, and
// downwards where they rose at once.
size_t LevelRows::choose_level(const Costs& costs) {
    solve(affinity_at(kMiddle, kHomeOverNear.front()), kCoarse);
    const auto seconds_of = [&](size_t level) {
        const float near = static_cast<float>(kNear[level]);
        const PriceSolver::Rows rows = prices_.count_rows(near * kHomeOverNear.front(), near);
        return rows.near * costs.near_row_s + rows.far * costs.far_row_s;
    };
    double least = seconds_of(kMiddle);
    const auto falls = [&](size_t level) {
        const double seconds = seconds_of(level);
        return seconds < least * (1 - kWorthIt) ? (least = seconds, true) : false;
    };
    size_t level = kMiddle;
    while (level + 1 < kNear.size() && falls(level + 1))
        ++level;
    while (level <= kMiddle && level > 0 && falls(level - 1))
        --level;
    return level;
}

// Weights for the seats of tried_: at less affinity where loads cannot be levelled at the one whose rows are best.
void LevelRows::split(const Costs& costs) {
    size_t level = choose_level(costs), step = 0;
    for (;;) {
        const Affinity affinity = affinity_at(level, kHomeOverNear[step]);
        const float worst = solve(affinity, kTolerance);
        weigh(affinity, costs);
        if (tried_.seconds < best_.seconds) best_ = tried_;
        if (worst <= kLost) return;
        if (step + 1 < kHomeOverNear.size()) {
            ++step;
        } else if (level > 0) {
            --level;
        } else {
            return;
        }
    }
}

void LevelRows::plan_within(int32_t limit, const Layer& layer, const std::vector<double>& load_E, const Costs& costs,
                            Holders& holders) {
    fill_.level(layer, load_E, limit, holders);
    fill_.save_rows(layer, costs, limit, holders);
    holders.list(tried_.seats);
    prices_.begin(layer, load_E, tried_.seats);
    split(costs);
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

Measure LevelRows::split_anew(const Layer& layer, const std::vector<double>& load_E, const Costs& costs, Seats& seats) {
    best_.seconds = std::numeric_limits<double>::infinity();
    meter_.begin(layer, load_E);
    std::swap(tried_.seats, seats);
    prices_.begin(layer, load_E, tried_.seats);
    split(costs);
    std::swap(seats, best_.seats);
    return best_.measure;
}

}  // namespace moetrain::planner
