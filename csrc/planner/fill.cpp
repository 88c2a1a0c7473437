#include "planner/fill.h"

#include <algorithm>
#include <array>
#include <limits>

namespace moetrain::planner {
namespace {

// What is nearer to the mean than this is level, and no replica is spent on moving less.
constexpr double kLevel = 1.0 / 512;
constexpr double kStillHot = 1.0 / 128;
// Levels to bring the hottest down to, over the mean, the lowest that the slots allow.
constexpr std::array<double, 7> kTargets = {1, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7};
constexpr double kNone = std::numeric_limits<double>::infinity();

}  // namespace

Fill::Fill(const Cluster& cluster)
    : cluster_(cluster),
      load_G_(cluster.num_groups),
      asked_G_(cluster.num_groups),
      lightest_N_(cluster.num_nodes()),
      least_N_(cluster.num_nodes()) {}

void Fill::begin(const Layer& layer, const std::vector<double>& load_E, double over_mean, Holders& holders) {
    holders.reset(layer.owner_E);
    left_E_ = load_E;
    std::fill(load_G_.begin(), load_G_.end(), 0.0);
    double total = 0;
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        load_G_[layer.owner_E[e]] += load_E[e];
        total += load_E[e];
    }
    target_ = over_mean * total / cluster_.num_groups;
}

int32_t Fill::heaviest_expert(const std::vector<int32_t>& held) const {
    int32_t best = -1;
    for (const int32_t e : held) {
        if (best < 0 || left_E_[e] > left_E_[best] || (left_E_[e] == left_E_[best] && e < best)) best = e;
    }
    return best;
}

void Fill::find_lightest(int32_t node, int32_t limit, const Holders& holders) {
    int32_t best = -1;
    for (int32_t g = cluster_.first_of(node); g < cluster_.first_of(node + 1); ++g) {
        if (holders.replicas(g) < limit && (best < 0 || load_G_[g] < load_G_[best])) best = g;
    }
    lightest_N_[node] = best;
    least_N_[node] = best < 0 ? kNone : load_G_[best];
}

int32_t Fill::taker_of(int32_t expert, int32_t limit, const Holders& holders) const {
    double least = target_ * (1 - kLevel);
    int32_t best = -1;
    const int32_t* const on_node_N = holders.on_nodes(expert);
    for (int32_t n = 0; n < cluster_.num_nodes(); ++n) {  // without branches: which node it will be nobody can foretell
        const double load = on_node_N[n] == 0 ? least_N_[n] : kNone;
        best = load < least ? n : best;
        least = load < least ? load : least;
    }
    if (best >= 0) return lightest_N_[best];
    for (int32_t n = 0; n < cluster_.num_nodes(); ++n) {
        if (least_N_[n] >= least) continue;
        for (int32_t g = cluster_.first_of(n); g < cluster_.first_of(n + 1); ++g) {
            if (load_G_[g] < least && holders.replicas(g) < limit && !holders.holds(expert, g))
                least = load_G_[g], best = g;
        }
    }
    return best;
}

// Whether the group still has an excess that may move.
bool Fill::move_some(int32_t hot, int32_t limit, Holders& holders) {
    const double least = target_ * kLevel;
    const int32_t expert = heaviest_expert(holders.held_by(hot));  // its own: takers stay below the mean
    const int32_t taker = taker_of(expert, limit, holders);
    if (taker < 0) return false;
    const double moved = std::min({load_G_[hot] - target_, target_ - load_G_[taker], left_E_[expert]});
    if (moved < least) return false;  // it has no load to give
    holders.add(expert, taker);
    left_E_[expert] -= moved;
    load_G_[hot] -= moved;
    load_G_[taker] += moved;
    find_lightest(cluster_.node_of(taker), limit, holders);
    return load_G_[hot] - target_ >= least;
}

void Fill::move_excess(bool smallest_first, int32_t limit, Holders& holders) {
    const double sign = smallest_first ? -1 : 1;
    for (int32_t n = 0; n < cluster_.num_nodes(); ++n)
        find_lightest(n, limit, holders);
    hot_.clear();
    for (int32_t g = 0; g < cluster_.num_groups; ++g) {
        if (load_G_[g] - target_ >= target_ * kLevel) hot_.emplace_back(sign * load_G_[g], -g);
    }
    std::make_heap(hot_.begin(), hot_.end());
    while (!hot_.empty()) {
        std::pop_heap(hot_.begin(), hot_.end());
        const int32_t hot = -hot_.back().second;
        hot_.pop_back();
        if (!move_some(hot, limit, holders)) continue;
        hot_.emplace_back(sign * load_G_[hot], -hot);
        std::push_heap(hot_.begin(), hot_.end());
    }
}

bool Fill::is_level() const { return *std::max_element(load_G_.begin(), load_G_.end()) <= target_ * (1 + kStillHot); }

void Fill::level(const Layer& layer, const std::vector<double>& load_E, int32_t limit, Holders& holders) {
    const bool few_own = 2 * cluster_.num_experts <= cluster_.num_groups;  // slots are short, reserving them is needed
    for (const double over_mean : kTargets) {
        for (const bool reserve : {few_own, !few_own}) {
            begin(layer, load_E, over_mean, holders);
            if (limit == 0) return;
            if (reserve) move_excess(true, limit - 1, holders);
            move_excess(false, limit, holders);
            if (is_level()) return;
        }
    }
}

// Returns how many replicas the node may still get.
int32_t Fill::weigh_groups(const Layer& layer, int32_t node, int32_t limit, const Holders& holders) {
    int32_t left = 0;
    for (int32_t g = cluster_.first_of(node); g < cluster_.first_of(node + 1); ++g) {
        asked_G_[g] = 0;
        for (const int32_t e : holders.held_by(g))
            asked_G_[g] += layer.count(node, e);
        left += std::max(0, limit - holders.replicas(g));
    }
    return left;
}

int32_t Fill::least_asked(int32_t expert, int32_t node, int32_t limit, const Holders& holders) const {
    int32_t best = -1;
    for (int32_t g = cluster_.first_of(node); g < cluster_.first_of(node + 1); ++g) {
        if (holders.replicas(g) >= limit || holders.holds(expert, g)) continue;
        if (best < 0 || asked_G_[g] < asked_G_[best]) best = g;
    }
    return best;
}

// Into gain_, of which the first `most` are kept; returns what a gain must exceed to be one of those.
double Fill::keep_best(double gain_s, int32_t expert, size_t most) {
    if (gain_.size() >= most) gain_.pop_back();
    auto place = gain_.end();
    while (place != gain_.begin() && (place - 1)->first < gain_s)
        --place;
    gain_.emplace(place, gain_s, expert);
    return gain_.size() >= most ? gain_.back().first : 0;
}

void Fill::spend(const Layer& layer, int32_t node, double first_s, double home_s, int32_t limit, Holders& holders) {
    const int32_t left = weigh_groups(layer, node, limit, holders);
    if (left == 0) return;
    gain_.clear();
    double least_s = 0;
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        const double pair_s = home_s + (holders.on_node(e, node) == 0 ? first_s : 0.0);
        const double gain_s = layer.count(node, e) * pair_s;
        if (gain_s > least_s) least_s = keep_best(gain_s, e, left);
    }
    for (int32_t placed = 0; placed < left && !gain_.empty();) {
        const int32_t e = gain_.front().second;
        gain_.erase(gain_.begin());
        const int32_t group = least_asked(e, node, limit, holders);
        if (group < 0) continue;  // who has a slot left holds it
        holders.add(e, group);
        asked_G_[group] += layer.count(node, e);
        ++placed;
        const double gain_s = layer.count(node, e) * home_s;  // of another: what it computes at home
        if (gain_s > (gain_.size() < static_cast<size_t>(left) ? 0 : gain_.back().first)) keep_best(gain_s, e, left);
    }
}

void Fill::save_rows(const Layer& layer, const Costs& costs, int32_t limit, Holders& holders) {
    const double first_s = std::max(0.0, costs.far_row_s - costs.near_row_s);
    const double home_s = costs.near_row_s / cluster_.groups_per_node;  // one source of the node is the holder
    for (int32_t node = 0; node < cluster_.num_nodes(); ++node)
        spend(layer, node, first_s, home_s, limit, holders);
}

}  // namespace moetrain::planner
