#include "planner/measure.h"

#include <algorithm>

namespace moetrain::planner {

void sum_nodes(const Cluster& cluster, const Layer& layer, std::vector<double>& load_E) {
    load_E.assign(cluster.num_experts, 0.0);
    for (int32_t n = 0; n < cluster.num_nodes(); ++n) {
        for (int32_t e = 0; e < cluster.num_experts; ++e)
            load_E[e] += layer.count(n, e);
    }
}

void Meter::Factors::add(double count, double sum_of_shares, double sum_of_weights) {
    if (sum_of_shares > 0) {
        shared += count / sum_of_shares;
    } else {
        flat += count / sum_of_weights;
    }
}

Meter::Meter(const Cluster& cluster)
    : cluster_(cluster),
      pairs_G_(cluster.num_groups),
      near_in_G_(cluster.num_groups),
      far_in_G_(cluster.num_groups),
      count_N_(cluster.num_nodes()),
      at_home_N_(cluster.num_nodes()),
      near_N_(cluster.num_nodes()),
      replicas_G_(cluster.num_groups) {}

void Meter::begin(const Layer& layer, const std::vector<double>& load_E) {
    layer_ = layer;
    load_E_ = &load_E;
    for (int32_t n = 0; n < cluster_.num_nodes(); ++n) {
        count_N_[n] = 0;
        for (int32_t e = 0; e < cluster_.num_experts; ++e)
            count_N_[n] += layer.count(n, e);
    }
}

// The sources of an expert, by the sum of shares that they see: a node without a seat, one with some, a holder.
void Meter::split(const Seats& seats, int32_t expert) {
    const int32_t end = seats.offset_E1[expert + 1];
    const double home = seats.affinity.home, near = seats.affinity.near, far = seats.affinity.far;
    double weights = 0, outside = (*load_E_)[expert];
    for (int32_t z = seats.offset_E1[expert]; z < end; ++z)
        weights += seats.weight_Z[z];
    all_ = {};
    node_.clear();
    home_.clear();
    for (int32_t z = seats.offset_E1[expert], next; z < end; z = next) {
        next = node_end(seats, z, end);
        const double count = layer_.count(cluster_.node_of(seats.holder_Z[z]), expert);
        const double each = count / cluster_.groups_per_node;
        double here = 0;
        for (int32_t i = z; i < next; ++i)
            here += seats.weight_Z[i];
        const double sum = far * (weights - here) + near * here;
        Factors node;
        node.add(each * (cluster_.groups_per_node - (next - z)), sum, weights);
        for (int32_t i = z; i < next; ++i) {
            Factors own;
            own.add(each, sum + (home - near) * seats.weight_Z[i], weights);
            home_.push_back(own);
            node = node + own;
        }
        node_.push_back(node);
        all_ = all_ + node;
        outside -= count;
    }
    all_.add(std::max(0.0, outside), far * weights, weights);
}

void Meter::add_loads(const Seats& seats, int32_t expert) {
    const int32_t begin = seats.offset_E1[expert], end = seats.offset_E1[expert + 1];
    const Affinity& affinity = seats.affinity;
    size_t run = 0;
    for (int32_t z = begin, next; z < end; z = next, ++run) {
        next = node_end(seats, z, end);
        const int32_t node = cluster_.node_of(seats.holder_Z[z]);
        for (int32_t i = z; i < next; ++i) {
            const double weight = seats.weight_Z[i];
            const int32_t g = seats.holder_Z[i];
            const double at_home = home_[i - begin].pairs(weight, affinity.home);
            const double from_node = (node_[run] - home_[i - begin]).pairs(weight, affinity.near);
            const double from_far = (all_ - node_[run]).pairs(weight, affinity.far);
            pairs_G_[g] += at_home + from_node + from_far;
            near_in_G_[g] += from_node;
            far_in_G_[g] += from_far;
            at_home_N_[node] += at_home;
            near_N_[node] += from_node;
            replicas_G_[g] += g != layer_.owner_E[expert];
        }
    }
}

int32_t Meter::node_end(const Seats& seats, int32_t seat, int32_t end) const {
    const int32_t beyond = cluster_.first_of(cluster_.node_of(seats.holder_Z[seat]) + 1);
    while (seat < end && seats.holder_Z[seat] < beyond)
        ++seat;
    return seat;
}

Measure Meter::worst() const {
    Measure most{0, 0, 0, 0};
    for (int32_t g = 0; g < cluster_.num_groups; ++g) {
        const int32_t node = cluster_.node_of(g);
        const double near_out = near_N_[node] / cluster_.groups_per_node;
        const double far_out = (count_N_[node] - at_home_N_[node] - near_N_[node]) / cluster_.groups_per_node;
        most.pairs = std::max(most.pairs, pairs_G_[g]);
        most.near_rows = std::max({most.near_rows, near_in_G_[g], near_out});
        most.far_rows = std::max({most.far_rows, far_in_G_[g], far_out});
        most.replicas = std::max(most.replicas, static_cast<double>(replicas_G_[g]));
    }
    return most;
}

Measure Meter::measure(const Seats& seats) {
    for (auto* sums : {&pairs_G_, &near_in_G_, &far_in_G_, &at_home_N_, &near_N_})
        std::fill(sums->begin(), sums->end(), 0.0);
    std::fill(replicas_G_.begin(), replicas_G_.end(), 0);
    for (int32_t e = 0; e < cluster_.num_experts; ++e) {
        split(seats, e);
        add_loads(seats, e);
    }
    return worst();
}

}  // namespace moetrain::planner
