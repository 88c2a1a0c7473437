#include "planner/prices.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "planner/binary_powers.h"

namespace moetrain::planner {
namespace {

constexpr float kLeastLoad = 1e-3f;   // of the mean: a group without load is raised by 2^10 at most
constexpr float kMostLogarithm = 40;  // where a group cannot reach the mean its weight would rise without end
constexpr float kProgress = 1e-3f;    // where loads cannot be levelled nothing is gained by going on
constexpr int kPatience = 8;

}  // namespace

PriceSolver::PriceSolver(const Cluster& cluster)
    : cluster_(cluster),
      load_G_(cluster.num_groups),
      weight_G_(cluster.num_groups),
      best_G_(cluster.num_groups),
      log_G_(cluster.num_groups),
      rise_G_(cluster.num_groups),
      near_G_(cluster.num_groups),
      far_G_(cluster.num_groups),
      acceleration_(cluster.num_groups) {}

void PriceSolver::begin(const Layer& layer, const std::vector<double>& load_E, const Seats& seats) {
    const int32_t per_node = cluster_.groups_per_node;
    runs_.clear();
    holder_Z_ = seats.holder_Z;
    offset_E1_ = seats.offset_E1;
    outside_E_.clear();
    run_E1_.assign(1, 0);
    double total = 0;
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        double outside = load_E[e];
        total += load_E[e];
        for (int32_t z = seats.offset_E1[e], end; z < seats.offset_E1[e + 1]; z = end) {
            const int32_t node = cluster_.node_of(seats.holder_Z[z]);
            for (end = z + 1; end < seats.offset_E1[e + 1] && cluster_.node_of(seats.holder_Z[end]) == node;)
                ++end;
            const float at_home = layer.count(node, e) / static_cast<float>(per_node);
            runs_.push_back({z, end, at_home, at_home * static_cast<float>(per_node - (end - z))});
            outside -= layer.count(node, e);
        }
        outside_E_.push_back(static_cast<float>(std::max(0.0, outside)));
        run_E1_.push_back(static_cast<int32_t>(runs_.size()));
    }
    mean_ = static_cast<float>(total / cluster_.num_groups);
    weight_Z_.resize(holder_Z_.size());
    factor_Z_.resize(holder_Z_.size());
    std::fill(log_G_.begin(), log_G_.end(), 0.0f);
    last_near_ = last_home_ = 0;
}

// Fills factor_Z_ with what a seat gets from its own node beyond what it would get from afar; returns the pairs over
// sums of shares of the node's sources.
float PriceSolver::factors_of(const Run& run, float sum, float home, float near) {
    const float near_more = near - 1, home_more = home - near;
    if (run.end - run.begin == 1) {  // nearly always: the same with one division
        const float weight = weight_Z_[run.begin];
        const float sum_here = sum + near_more * weight, sum_home = sum_here + home_more * weight;
        const float inverse = 1 / (sum_here * sum_home);
        const float at_home = run.at_home * sum_here * inverse;
        const float here = run.others * sum_home * inverse + at_home;
        factor_Z_[run.begin] = near_more * here + home_more * at_home;
        return here;
    }
    float on_node = 0;
    for (int32_t z = run.begin; z < run.end; ++z)
        on_node += weight_Z_[z];
    const float sum_here = sum + near_more * on_node;
    float here = run.others / sum_here;
    for (int32_t z = run.begin; z < run.end; ++z)
        here += factor_Z_[z] = run.at_home / (sum_here + home_more * weight_Z_[z]);
    for (int32_t z = run.begin; z < run.end; ++z)
        factor_Z_[z] = near_more * here + home_more * factor_Z_[z];
    return here;
}

void PriceSolver::find_loads(float home, float near) {
    std::fill(load_G_.begin(), load_G_.end(), 0.0f);
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        const int32_t begin = offset_E1_[e], end = offset_E1_[e + 1];
        float sum = 0;
        for (int32_t z = begin; z < end; ++z)
            sum += weight_Z_[z] = weight_G_[holder_Z_[z]];
        float all = outside_E_[e] / sum;
        for (int32_t r = run_E1_[e]; r < run_E1_[e + 1]; ++r)
            all += factors_of(runs_[r], sum, home, near);
        for (int32_t z = begin; z < end; ++z)
            load_G_[holder_Z_[z]] += weight_Z_[z] * (all + factor_Z_[z]);
    }
}

PriceSolver::Rows PriceSolver::count_rows(float home, float near) {
    const float near_more = near - 1, home_more = home - near;
    std::fill(near_G_.begin(), near_G_.end(), 0.0f);
    std::fill(far_G_.begin(), far_G_.end(), 0.0f);
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        float sum = 0;
        for (int32_t z = offset_E1_[e]; z < offset_E1_[e + 1]; ++z)
            sum += weight_Z_[z] = best_G_[holder_Z_[z]];
        float all = outside_E_[e] / sum;
        for (int32_t r = run_E1_[e]; r < run_E1_[e + 1]; ++r) {
            const Run& run = runs_[r];
            float on_node = 0;
            for (int32_t z = run.begin; z < run.end; ++z)
                on_node += weight_Z_[z];
            const float sum_here = sum + near_more * on_node;
            float here = run.others / sum_here;
            for (int32_t z = run.begin; z < run.end; ++z)
                here += factor_Z_[z] = run.at_home / (sum_here + home_more * weight_Z_[z]);
            for (int32_t z = run.begin; z < run.end; ++z) {
                near_G_[holder_Z_[z]] += near * weight_Z_[z] * (here - factor_Z_[z]);
                far_G_[holder_Z_[z]] -= weight_Z_[z] * here;  // of all, below
            }
            all += here;
        }
        for (int32_t z = offset_E1_[e]; z < offset_E1_[e + 1]; ++z)
            far_G_[holder_Z_[z]] += weight_Z_[z] * all;
    }
    return {*std::max_element(near_G_.begin(), near_G_.end()), *std::max_element(far_G_.begin(), far_G_.end())};
}

void PriceSolver::step() {
    const float mean = mean_, least = kLeastLoad * mean;
    const float* const load = load_G_.data();
    float* const rise = rise_G_.data();
    for (size_t g = 0; g < load_G_.size(); ++g)
        rise[g] = log2_of(mean / std::max(least, load[g]));
    acceleration_.step(log_G_, rise_G_);
    for (float& log : log_G_)
        log = std::min(kMostLogarithm, std::max(-kMostLogarithm, log));
}

float PriceSolver::solve(float home, float near, float tolerance, int most) {
    float best = 0;
    int since_best = 0;
    if (near != last_near_ || home != last_home_) acceleration_.restart();  // it is another function
    last_near_ = near, last_home_ = home;
    for (int i = 0; i < most; ++i) {
        std::transform(log_G_.begin(), log_G_.end(), weight_G_.begin(), [](float x) { return exp2_of(x); });
        find_loads(home, near);
        const float worst = *std::max_element(load_G_.begin(), load_G_.end());
        since_best = i == 0 || worst < best * (1 - kProgress) ? 0 : since_best + 1;
        if (i == 0 || worst < best) best = worst, best_G_ = weight_G_, best_log_G_ = log_G_;
        if (!(worst > (1 + tolerance) * mean_) || since_best > kPatience) break;
        step();
    }
    log_G_ = best_log_G_;
    return mean_ > 0 ? best / mean_ : 1;
}

}  // namespace moetrain::planner
