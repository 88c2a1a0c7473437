#include "planner/fill.h"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <limits>

namespace moetrain::planner {
namespace {

// What is nearer to the mean than this is level, and no replica is spent on moving less.
constexpr double kLevel = 1.0 / 512;
constexpr double kStillHot = 1.0 / 128;
// Levels to bring the hottest down to, over the mean, the lowest that the slots allow.
constexpr std::array<double, 7> kTargets = {1, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7};
constexpr float kAfterEquals = 0.99999F;
constexpr double kNone = std::numeric_limits<double>::infinity();

}  // namespace

Fill::Fill(const Cluster& cluster)
    : cluster_(cluster),
      load_G_(cluster.num_groups),
      asked_G_(cluster.num_groups),
      lightest_N_(cluster.num_nodes()),
      place_N_(cluster.num_nodes()),
      gain_E_(cluster.num_experts),
      candidate_(cluster.num_experts),
      gain_(cluster.num_experts) {}

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

Fill::Lightest Fill::find_lightest(int32_t node, int32_t limit, const Holders& holders) const {
    Lightest best{kNone, node, -1};
    for (int32_t g = cluster_.first_of(node); g < cluster_.first_of(node + 1); ++g) {
        const double load =
            holders.replicas(g) < limit ? load_G_[g] : kNone;  // without branches: which it will be nobody can foretell
        best.group = load < best.load ? g : best.group;
        best.load = load < best.load ? load : best.load;
    }
    return best;
}

void Fill::order_nodes(int32_t limit, const Holders& holders) {
    for (int32_t n = 0; n < cluster_.num_nodes(); ++n)
        lightest_N_[n] = find_lightest(n, limit, holders);
    std::sort(lightest_N_.begin(), lightest_N_.end());
    for (int32_t place = 0; place < cluster_.num_nodes(); ++place)
        place_N_[lightest_N_[place].node] = place;
}

// A group of the node took load or its last slot: others may now come before it.
void Fill::order_anew(int32_t node, int32_t limit, const Holders& holders) {
    const Lightest now = find_lightest(node, limit, holders);
    int32_t place = place_N_[node];
    for (; place + 1 < cluster_.num_nodes() && lightest_N_[place + 1] < now; ++place) {
        lightest_N_[place] = lightest_N_[place + 1];
        place_N_[lightest_N_[place].node] = place;
    }
    lightest_N_[place] = now;
    place_N_[node] = place;
}

int32_t Fill::taker_of(int32_t expert, int32_t limit, const Holders& holders) const {
    double least = target_ * (1 - kLevel);
    for (const Lightest& one : lightest_N_) {
        if (!(one.load < least)) break;
        if (!holders.is_on_node(expert, one.node)) return one.group;
    }
    int32_t best = -1;
    for (const Lightest& one : lightest_N_) {
        if (one.load > least) break;
        for (int32_t g = cluster_.first_of(one.node); g < cluster_.first_of(one.node + 1); ++g) {
            const bool before = load_G_[g] < least || (load_G_[g] == least && g < best);
            if (before && holders.replicas(g) < limit && !holders.holds(expert, g)) least = load_G_[g], best = g;
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
    order_anew(cluster_.node_of(taker), limit, holders);
    return load_G_[hot] - target_ >= least;
}

void Fill::move_excess(bool smallest_first, int32_t limit, Holders& holders) {
    const double sign = smallest_first ? -1 : 1;
    order_nodes(limit, holders);
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

double Fill::highest_load() const { return *std::max_element(load_G_.begin(), load_G_.end()); }

double Fill::level(const Layer& layer, const std::vector<double>& load_E, int32_t limit, Holders& holders) {
    const bool few_own = 2 * cluster_.num_experts <= cluster_.num_groups;  // slots are short, reserving them is needed
    double highest = 0;
    for (const double over_mean : kTargets) {
        for (const bool reserve : {few_own, !few_own}) {
            begin(layer, load_E, over_mean, holders);
            if (limit > 0 && reserve) move_excess(true, limit - 1, holders);
            if (limit > 0) move_excess(false, limit, holders);
            highest = target_ > 0 ? over_mean * highest_load() / target_ : 1;
            if (limit == 0 || highest <= over_mean * (1 + kStillHot)) return highest;
        }
    }
    return highest;
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
    const bool may_hold = holders.is_on_node(expert, node);
    int32_t best = -1;
    for (int32_t g = cluster_.first_of(node); g < cluster_.first_of(node + 1); ++g) {
        if (holders.replicas(g) >= limit || (best >= 0 && asked_G_[g] >= asked_G_[best])) continue;
        if (!may_hold || !holders.holds(expert, g)) best = g;
    }
    return best;
}

// Fills hottest_ with as many experts as `most`, by falling load.
void Fill::find_hottest(const std::vector<double>& load_E, size_t most) {
    by_load_.resize(load_E.size());
    for (size_t e = 0; e < load_E.size(); ++e)  // of two that are equal the lower one comes first
        by_load_[e] = (uint64_t{std::bit_cast<uint32_t>(static_cast<float>(load_E[e]))} << 32) | (UINT32_MAX - e);
    const auto end = by_load_.begin() + std::min(most, by_load_.size());
    std::partial_sort(by_load_.begin(), end, by_load_.end(), std::greater<>());
    hottest_.clear();
    for (auto each = by_load_.begin(); each != end; ++each)
        hottest_.push_back(static_cast<int32_t>(UINT32_MAX - static_cast<uint32_t>(*each)));
}

// Seconds that as many experts as `most` save at least each: the hottest of those without a seat on the node.
float Fill::bound_of_gains(const uint8_t* is_here_E, size_t most) const {
    float bound = std::numeric_limits<float>::infinity();
    for (const int32_t e : hottest_) {
        if (is_here_E[e]) continue;
        bound = std::min(bound, gain_E_[e]);
        if (--most == 0) return bound;
    }
    return 0;
}

// Fills candidate_ with all experts that gain the bound, and gain_ with what they gain.
void Fill::find_candidates(float bound) {
    size_t found = 0;
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {  // without branches likewise
        candidate_[found] = e;
        gain_[found] = gain_E_[e];
        found += gain_E_[e] >= bound;
    }
    num_candidates_ = found;
}

// The place of the first of most gain among the candidates.
size_t Fill::best_candidate() const {
    size_t best = 0;
    float most_s = gain_[0];
    for (size_t i = 1; i < num_candidates_; ++i) {
        best = gain_[i] > most_s ? i : best;
        most_s = gain_[i] > most_s ? gain_[i] : most_s;
    }
    return best;
}

void Fill::spend(const Layer& layer, int32_t node, double first_s, double home_s, int32_t limit, Holders& holders) {
    int32_t left = weigh_groups(layer, node, limit, holders);
    if (left == 0) return;
    const float* const count_E = layer.count_NE + static_cast<size_t>(node) * cluster_.num_experts;
    const uint8_t* const is_here_E = holders.experts_on(node);
    const float at_home_s = static_cast<float>(home_s), new_s = static_cast<float>(home_s + first_s);
    for (int32_t e = 0; e < cluster_.num_experts; ++e)
        gain_E_[e] = count_E[e] * (is_here_E[e] ? at_home_s : new_s);
    find_candidates(bound_of_gains(is_here_E, left));
    while (left > 0) {
        const size_t best = best_candidate();
        const float gain_s = gain_[best];
        if (!(gain_s > 0)) break;
        const int32_t e = candidate_[best], group = least_asked(e, node, limit, holders);
        gain_[best] = 0;
        if (group < 0) continue;  // who has a slot left holds it
        holders.add(e, group);
        asked_G_[group] += count_E[e];
        // Of another: what it computes at home. Others that would gain as much come first, or one would take all slots.
        gain_[best] = std::min(count_E[e] * at_home_s, gain_s) * kAfterEquals;
        --left;
    }
}

void Fill::save_rows(const Layer& layer, const std::vector<double>& load_E, const Costs& costs, int32_t limit,
                     Holders& holders) {
    const double first_s = std::max(0.0, costs.far_row_s - costs.near_row_s);
    const double home_s = costs.near_row_s / cluster_.groups_per_node;  // one source of the node is the holder
    find_hottest(load_E, 3 * static_cast<size_t>(limit) * cluster_.groups_per_node);  // some stand on the node already
    for (int32_t node = 0; node < cluster_.num_nodes(); ++node)
        spend(layer, node, first_s, home_s, limit, holders);
}

}  // namespace moetrain::planner
