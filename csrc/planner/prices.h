// Prices of groups that level their load. A group's weight, 2^-price, is the same in all its seats.
//
// The sum over sources and experts of count * log(sum of shares), less mean * (sum of the weights' logarithms), is
// convex in those logarithms, and where all loads are the mean it is least. Raising each weight by mean / load is
// Sinkhorn's step down it; Nesterov's momentum, begun anew where the two disagree, makes few of them enough. An
// iteration is linear in the seats: all nodes without a seat of an expert share one sum of shares.
#pragma once
#include <array>
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

    // Preferences of which the rows are counted together: a vector of the machine takes them all.
    static constexpr int kTogether = 4;
    using Several = std::array<float, kTogether>;
    // Most pairs that a group receives from its own node, and from others, at the best weights of the last solve.
    struct Rows {
        Several near, far;
    };
    Rows count_rows(const Several& home, const Several& near);

    // Of the best iteration of the last solve.
    const std::vector<float>& weight_G() const { return best_G_; }

 private:
    struct Run {  // seats of one expert on one node, two or more
        int32_t begin, end, expert;
    };
    double begin_nodes(const Layer& layer, int32_t expert);
    float gather_weights(const std::vector<float>& weight_G, int32_t expert);
    void find_factors(float home, float near);
    void find_factors(const Run& run, float home, float near);
    void find_loads(float home, float near);
    Several add_rows_of_node(int32_t begin, int32_t end, float sum, const Several& home, const Several& near);
    void step();

    Cluster cluster_;
    float mean_ = 0, last_near_ = 0, last_home_ = 0;
    std::vector<int32_t> offset_E1_, holder_Z_;
    std::vector<int32_t> node_end_Z_;          // behind the last seat of the expert on the node
    std::vector<float> outside_E_, sum_E_;     // pairs from nodes without a seat; of the weights
    std::vector<float> at_home_Z_, others_Z_;  // pairs of the seat's rank, and of its node's ranks without a seat
    std::vector<Run> runs_;
    std::vector<float> weight_Z_, sum_Z_;
    std::vector<float> factor_Z_;  // what a seat gets from its own node beyond what it would get from afar
    std::vector<float> here_Z_;    // pairs over sums of shares of the node's sources, once in a run
    std::vector<float> load_G_, weight_G_, best_G_;
    std::vector<float> log_G_, rise_G_, best_log_G_;  // logarithms of weights, and Sinkhorn's steps
    std::vector<Several> near_G_, far_G_, home_Z_;
    Anderson acceleration_;
};

}  // namespace moetrain::planner
