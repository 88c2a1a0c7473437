// What a placement makes of given counts, by the model of moetrain/cost/step_costs.py.
#pragma once
#include <vector>

#include "planner/problem.h"

namespace moetrain::planner {

// Pairs of each expert from all nodes.
void sum_nodes(const Cluster& cluster, const Layer& layer, std::vector<double>& load_E);

// Of the worst group each. A row counts once per pair here; the assignment of tokens saves those that it can.
struct Measure {
    double pairs;      // computed
    double near_rows;  // in or out, from or to its own node, which of the two is more
    double far_rows;   // in or out, from or to other nodes
    double replicas;
};

inline double layer_seconds(const Measure& of, const Costs& costs) {
    const double exposed_s = of.replicas * costs.expert_s - costs.overlap_s;
    return of.pairs * costs.pair_s + of.near_rows * costs.near_row_s + of.far_rows * costs.far_row_s +
           (exposed_s > 0 ? exposed_s : 0);
}

class Meter {
 public:
    explicit Meter(const Cluster& cluster);

    // Until the next call, measure() is of these counts. The sources of a node are taken to have the same.
    void begin(const Layer& layer, const std::vector<double>& load_E);
    // Linear in the seats.
    Measure measure(const Seats& seats);

 private:
    // Pairs over the sum of shares, and pairs whose shares are all 0 over the sum of weights.
    struct Factors {
        double shared = 0, flat = 0;
        void add(double count, double sum_of_shares, double sum_of_weights);
        Factors operator+(const Factors& other) const { return {shared + other.shared, flat + other.flat}; }
        Factors operator-(const Factors& other) const { return {shared - other.shared, flat - other.flat}; }
        double pairs(double weight, double affinity) const { return weight * (affinity * shared + flat); }
    };
    void split(const Seats& seats, int32_t expert);
    void add_loads(const Seats& seats, int32_t expert);
    int32_t node_end(const Seats& seats, int32_t seat, int32_t end) const;
    Measure worst() const;

    Cluster cluster_;
    Layer layer_{};
    const std::vector<double>* load_E_ = nullptr;
    Factors all_;  // of one expert, and so are these: per run of seats on a node, per seat
    std::vector<Factors> node_, home_;
    std::vector<double> pairs_G_, near_in_G_, far_in_G_;
    std::vector<double> count_N_, at_home_N_, near_N_;  // of sources
    std::vector<int32_t> replicas_G_;
};

}  // namespace moetrain::planner
