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

constexpr float kTolerance = 0.0075f;
constexpr float kCoarse = 0.03f;  // enough to count rows with
constexpr double kLost = 1.01;    // of what can be reached: above it loads are not levelled
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

// Of kTogether levels from `first` on, by the rows alone.
std::array<double, PriceSolver::kTogether> LevelRows::row_seconds(size_t first, const Costs& costs) {
    PriceSolver::Several home, near;
    for (int i = 0; i < PriceSolver::kTogether; ++i) {
        near[i] = static_cast<float>(kNear[first + i]);
        home[i] = near[i] * kHomeOverNear.front();
    }
    const PriceSolver::Rows rows = prices_.count_rows(home, near);
    std::array<double, PriceSolver::kTogether> seconds;
    for (int i = 0; i < PriceSolver::kTogether; ++i)
        seconds[i] = rows.near[i] * costs.near_row_s + rows.far[i] * costs.far_row_s;
    return seconds;
}

// At prices that nearly level loads in the middle: from there upwards while seconds fall, and downwards where they rose
// at once.
size_t LevelRows::choose_level(const Costs& costs) {
    solve(affinity_at(kMiddle, kHomeOverNear.front()), kCoarse);
    constexpr size_t kHigh = kNear.size() - PriceSolver::kTogether;
    static_assert(kHigh < kMiddle && kMiddle < PriceSolver::kTogether);  // both hold the middle and one below it
    auto seconds = row_seconds(kHigh, costs);
    const auto falls = [&](size_t at, size_t to) { return seconds[to] < seconds[at] * (1 - kWorthIt); };
    size_t level = kMiddle;
    while (level + 1 < kNear.size() && falls(level - kHigh, level + 1 - kHigh))
        ++level;
    if (level > kMiddle || !falls(kMiddle - kHigh, kMiddle - 1 - kHigh)) return level;
    seconds = row_seconds(0, costs);
    while (level > 0 && falls(level, level - 1))
        --level;
    return level;
}

// Weights for the seats of tried_: at less affinity where loads cannot be levelled at the one whose rows are best.
// `highest` is the highest load over the mean that is hoped for: while it is not reached, the search goes on.
void LevelRows::split(double highest, const Costs& costs) {
    size_t level = choose_level(costs), step = 0;
    for (;;) {
        const Affinity affinity = affinity_at(level, kHomeOverNear[step]);
        const float worst = solve(affinity, kTolerance);
        weigh(affinity, costs);
        if (tried_.seconds < best_.seconds) best_ = tried_;
        if (worst <= kLost * highest) return;
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
    const double highest = fill_.level(layer, load_E, limit, holders);
    fill_.save_rows(layer, load_E, costs, limit, holders);
    holders.list(tried_.seats);
    prices_.begin(layer, load_E, tried_.seats);
    split(highest, costs);
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
    split(1, costs);
    std::swap(seats, best_.seats);
    return best_.measure;
}

}  // namespace moetrain::planner
