#include "planner/hecate.h"

#include <algorithm>
#include <numeric>

namespace moetrain::planner {

Hecate::Hecate(const Cluster& cluster)
    : cluster_(cluster), hottest_(cluster.num_experts), free_N_(cluster.num_nodes()) {}

// Largest remainder; an expert takes no more than the groups that do not own it.
void Hecate::share_slots(const std::vector<double>& load_E, int32_t num_hot, int32_t num_slots) {
    double total = 0;
    for (int32_t i = 0; i < num_hot; ++i)
        total += load_E[hottest_[i]];
    share_.assign(num_hot, 0);
    if (!(total > 0)) return;
    const int32_t most = cluster_.num_groups - 1;
    std::vector<double> rest(num_hot);
    int32_t left = num_slots;
    for (int32_t i = 0; i < num_hot; ++i) {
        const double exact = load_E[hottest_[i]] / total * num_slots;
        share_[i] = std::min(most, static_cast<int32_t>(exact));
        rest[i] = exact - share_[i];
        left -= share_[i];
    }
    by_rest_.resize(num_hot);
    std::iota(by_rest_.begin(), by_rest_.end(), 0);
    std::stable_sort(by_rest_.begin(), by_rest_.end(), [&](int32_t a, int32_t b) { return rest[a] > rest[b]; });
    for (const int32_t i : by_rest_) {
        if (left <= 0) break;
        if (share_[i] < most && load_E[hottest_[i]] > 0) ++share_[i], --left;
    }
}

bool Hecate::place(int32_t expert, int32_t limit, Holders& holders) {
    int32_t best = -1, best_node = -1;
    for (int32_t n = 0; n < cluster_.num_nodes(); ++n) {
        if (best >= 0 && free_N_[n] <= free_N_[best_node]) continue;
        int32_t group = -1;
        for (int32_t g = cluster_.first_of(n); g < cluster_.first_of(n + 1); ++g) {
            if (holders.replicas(g) >= limit || holders.holds(expert, g)) continue;
            if (group < 0 || holders.replicas(g) < holders.replicas(group)) group = g;
        }
        if (group >= 0) best = group, best_node = n;
    }
    if (best < 0) return false;
    holders.add(expert, best);
    --free_N_[best_node];
    return true;
}

void Hecate::plan(const std::vector<double>& load_E, int32_t overlap_degree, Holders& holders) {
    const int32_t num_hot = std::min(overlap_degree, cluster_.num_experts);
    const int32_t slots = std::min(cluster_.slots, num_hot);
    std::iota(hottest_.begin(), hottest_.end(), 0);
    std::stable_sort(hottest_.begin(), hottest_.end(), [&](int32_t a, int32_t b) { return load_E[a] > load_E[b]; });
    if (num_hot <= slots) {
        for (int32_t i = 0; i < num_hot; ++i) {
            for (int32_t g = 0; g < cluster_.num_groups; ++g)
                if (!holders.holds(hottest_[i], g)) holders.add(hottest_[i], g);
        }
        return;
    }
    share_slots(load_E, num_hot, cluster_.num_groups * slots);
    std::fill(free_N_.begin(), free_N_.end(), cluster_.groups_per_node * slots);
    for (int32_t i = 0; i < num_hot; ++i) {
        for (int32_t k = 0; k < share_[i] && place(hottest_[i], slots, holders); ++k) {
        }
    }
}

}  // namespace moetrain::planner
