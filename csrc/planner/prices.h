// Prices of groups that level their load. A group's weight, 2^-price, is the same in all its seats.
//
// The sum over sources and experts of count * log(sum of shares), less mean * (sum of the weights' logarithms), is
// convex in those logarithms, and where all loads are the mean it is least. Raising each weight by mean / load is
// Sinkhorn's step down it; Nesterov's momentum, begun anew where the two disagree, makes few of them enough. An
// iteration is linear in the seats: all nodes without a seat of an expert share one sum of shares.
#pragma once
#include <vector>

#include "planner/anderson.h"
#include "planner/problem.h"

namespace moetrain::planner {

class PriceSolver {
 public:
    explicit PriceSolver(const Cluster& cluster);

    // Of these seats; every group has the same price at first.
    void begin(const Layer& layer, const std::vector<double>& load_E, const Seats& seats);

    // Iterates until the highest load is at most (1 + tolerance) * mean, or `most` times, from where it was; near and
    // home count far as 1. Returns the highest load over the mean.
    float solve(float home, float near, float tolerance, int most);

    // Most pairs that a group receives from its own node, and from others, at the best weights of the last solve.
    struct Rows {
        float near, far;
    };
    Rows count_rows(float home, float near);

    // Of the best iteration of the last solve.
    const std::vector<float>& weight_G() const { return best_G_; }

 private:
    struct Run {  // seats of one expert on one node
        int32_t begin, end;
        float at_home, others;  // pairs of one source of the node, and of those sources that have no seat of it
    };
    float factors_of(const Run& run, float sum, float home, float near);
    void find_loads(float home, float near);
    void step();

    Cluster cluster_;
    float mean_ = 0, last_near_ = 0, last_home_ = 0;
    std::vector<int32_t> offset_E1_, holder_Z_, run_E1_;
    std::vector<float> outside_E_;  // pairs from nodes without a seat
    std::vector<Run> runs_;
    std::vector<float> weight_Z_, factor_Z_;
    std::vector<float> load_G_, weight_G_, best_G_;
    std::vector<float> log_G_, rise_G_, best_log_G_;  // logarithms of weights, and Sinkhorn's steps
    std::vector<float> near_G_, far_G_;
    Anderson acceleration_;
};

}  // namespace moetrain::planner
