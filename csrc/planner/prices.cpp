#include "planner/prices.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/clones.h"
#include "planner/binary_powers.h"

namespace moetrain::planner {
namespace {

constexpr float kLeastLoad = 1e-3f;   // of the mean: a group without load is raised by 2^10 at most
constexpr float kMostLogarithm = 40;  // where a group cannot reach the mean its weight would rise without end
constexpr float kProgress = 1e-3f;    // where loads cannot be levelled nothing is gained by going on
constexpr int kPatience = 8;

// Vectors of any width give the same bits: nothing here is a sum.
MOETRAIN_CLONES void find_rises(const std::vector<float>& load_G, float mean, std::vector<float>& rise_G) {
    const float least = kLeastLoad * mean;
    const float* const load = load_G.data();
    float* const rise = rise_G.data();
    for (size_t g = 0; g < load_G.size(); ++g)
        rise[g] = log2_of(mean / std::max(least, load[g]));
}

MOETRAIN_CLONES void find_weights(const std::vector<float>& log_G, std::vector<float>& weight_G) {
    const float* const log = log_G.data();
    float* const weight = weight_G.data();
    for (size_t g = 0; g < log_G.size(); ++g)
        weight[g] = exp2_of(log[g]);
}

}  // namespace

PriceSolver::PriceSolver(const Cluster& cluster)
    : cluster_(cluster),
      outside_E_(cluster.num_experts),
      sum_E_(cluster.num_experts),
      load_G_(cluster.num_groups),
      weight_G_(cluster.num_groups),
      best_G_(cluster.num_groups),
      log_G_(cluster.num_groups),
      rise_G_(cluster.num_groups),
      near_G_(cluster.num_groups),
      far_G_(cluster.num_groups),
      acceleration_(cluster.num_groups) {}

void PriceSolver::begin(const Layer& layer, const std::vector<double>& load_E, const Seats& seats) {
    holder_Z_ = seats.holder_Z;
    offset_E1_ = seats.offset_E1;
    for (auto* each : {&at_home_Z_, &others_Z_, &weight_Z_, &sum_Z_, &factor_Z_, &here_Z_})
        each->resize(holder_Z_.size());
    node_end_Z_.resize(holder_Z_.size());
    home_Z_.resize(holder_Z_.size());
    runs_.clear();
    double total = 0;
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        outside_E_[e] = static_cast<float>(std::max(0.0, load_E[e] - begin_nodes(layer, e)));
        total += load_E[e];
    }
    mean_ = static_cast<float>(total / cluster_.num_groups);
    std::fill(log_G_.begin(), log_G_.end(), 0.0f);
    last_near_ = last_home_ = 0;
}

// What the seats of the expert get from their own nodes; returns the pairs of those nodes.
double PriceSolver::begin_nodes(const Layer& layer, int32_t expert) {
    const int32_t per_node = cluster_.groups_per_node;
    double inside = 0;
    for (int32_t z = offset_E1_[expert], end; z < offset_E1_[expert + 1]; z = end) {
        const int32_t node = cluster_.node_of(holder_Z_[z]), beyond = cluster_.first_of(node + 1);
        for (end = z + 1; end < offset_E1_[expert + 1] && holder_Z_[end] < beyond;)
            ++end;
        if (end - z > 1) runs_.push_back({z, end, expert});
        const float at_home = layer.count(node, expert) / static_cast<float>(per_node);
        for (int32_t seat = z; seat < end; ++seat) {
            at_home_Z_[seat] = at_home;
            others_Z_[seat] = at_home * static_cast<float>(per_node - (end - z));
            node_end_Z_[seat] = end;
        }
        inside += layer.count(node, expert);
    }
    return inside;
}

// Of the expert's seats; returns their sum.
float PriceSolver::gather_weights(const std::vector<float>& weight_G, int32_t expert) {
    float sum = 0;
    for (int32_t z = offset_E1_[expert]; z < offset_E1_[expert + 1]; ++z)
        sum += weight_Z_[z] = weight_G[holder_Z_[z]];
    return sum;
}

// Of a seat alone on its node, as nearly all are: with one division.
MOETRAIN_CLONES void PriceSolver::find_factors(float home, float near) {
    const float near_more = near - 1, home_more = home - near;
    const float* const weight_Z = weight_Z_.data();
    const float* const sum_Z = sum_Z_.data();
    const float* const at_home_Z = at_home_Z_.data();
    const float* const others_Z = others_Z_.data();
    float* const factor_Z = factor_Z_.data();
    float* const here_Z = here_Z_.data();
    const size_t num_seats = holder_Z_.size();
    for (size_t z = 0; z < num_seats; ++z) {
        const float sum_here = sum_Z[z] + near_more * weight_Z[z], sum_home = sum_here + home_more * weight_Z[z];
        const float inverse = 1 / (sum_here * sum_home);
        const float at_home = at_home_Z[z] * sum_here * inverse;
        const float here = others_Z[z] * sum_home * inverse + at_home;
        factor_Z[z] = near_more * here + home_more * at_home;
        here_Z[z] = here;
    }
}

void PriceSolver::find_factors(const Run& run, float home, float near) {
    const float near_more = near - 1, home_more = home - near;
    float on_node = 0;
    for (int32_t z = run.begin; z < run.end; ++z)
        on_node += weight_Z_[z];
    const float sum_here = sum_E_[run.expert] + near_more * on_node;
    float here = others_Z_[run.begin] / sum_here;
    for (int32_t z = run.begin; z < run.end; ++z) {
        here += factor_Z_[z] = at_home_Z_[z] / (sum_here + home_more * weight_Z_[z]);
        here_Z_[z] = 0;
    }
    for (int32_t z = run.begin; z < run.end; ++z)
        factor_Z_[z] = near_more * here + home_more * factor_Z_[z];
    here_Z_[run.begin] = here;
}

void PriceSolver::find_loads(float home, float near) {
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        sum_E_[e] = gather_weights(weight_G_, e);
        for (int32_t z = offset_E1_[e]; z < offset_E1_[e + 1]; ++z)
            sum_Z_[z] = sum_E_[e];
    }
    find_factors(home, near);
    for (const Run& run : runs_)
        find_factors(run, home, near);
    std::fill(load_G_.begin(), load_G_.end(), 0.0f);
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        const int32_t begin = offset_E1_[e], end = offset_E1_[e + 1];
        float all = outside_E_[e] / sum_E_[e];
        for (int32_t z = begin; z < end; ++z)
            all += here_Z_[z];
        for (int32_t z = begin; z < end; ++z)
            load_G_[holder_Z_[z]] += weight_Z_[z] * (all + factor_Z_[z]);
    }
}

// Adds what sources on the node of seats [begin, end) send to them, and returns their pairs over sums of shares.
PriceSolver::Several PriceSolver::add_rows_of_node(int32_t begin, int32_t end, float sum, const Several& home,
                                                   const Several& near) {
    float on_node = 0;
    for (int32_t z = begin; z < end; ++z)
        on_node += weight_Z_[z];
    Several sum_here, here;
    for (int i = 0; i < kTogether; ++i) {
        sum_here[i] = sum + (near[i] - 1) * on_node;
        here[i] = others_Z_[begin] / sum_here[i];
    }
    for (int32_t z = begin; z < end; ++z) {
        for (int i = 0; i < kTogether; ++i)
            here[i] += home_Z_[z][i] = at_home_Z_[z] / (sum_here[i] + (home[i] - near[i]) * weight_Z_[z]);
    }
    for (int32_t z = begin; z < end; ++z) {
        Several& near_in = near_G_[holder_Z_[z]];
        Several& far_in = far_G_[holder_Z_[z]];
        for (int i = 0; i < kTogether; ++i) {
            near_in[i] += near[i] * weight_Z_[z] * (here[i] - home_Z_[z][i]);
            far_in[i] -= weight_Z_[z] * here[i];  // of all
        }
    }
    return here;
}

PriceSolver::Rows PriceSolver::count_rows(const Several& home, const Several& near) {
    std::fill(near_G_.begin(), near_G_.end(), Several{});
    std::fill(far_G_.begin(), far_G_.end(), Several{});
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        const float sum = gather_weights(best_G_, e);
        Several all;
        all.fill(outside_E_[e] / sum);
        for (int32_t z = offset_E1_[e]; z < offset_E1_[e + 1]; z = node_end_Z_[z]) {
            const Several here = add_rows_of_node(z, node_end_Z_[z], sum, home, near);
            for (int i = 0; i < kTogether; ++i)
                all[i] += here[i];
        }
        for (int32_t z = offset_E1_[e]; z < offset_E1_[e + 1]; ++z) {
            for (int i = 0; i < kTogether; ++i)
                far_G_[holder_Z_[z]][i] += weight_Z_[z] * all[i];
        }
    }
    Rows most{};
    for (int32_t g = 0; g < cluster_.num_groups; ++g) {
        for (int i = 0; i < kTogether; ++i) {
            most.near[i] = std::max(most.near[i], near_G_[g][i]);
            most.far[i] = std::max(most.far[i], far_G_[g][i]);
        }
    }
    return most;
}

void PriceSolver::step() {
    find_rises(load_G_, mean_, rise_G_);
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
        find_weights(log_G_, weight_G_);
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
