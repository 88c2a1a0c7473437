// Hecate's sparse materialisation (arXiv 2502.02581, algorithm 1), with tokens split evenly among an expert's holders.
#pragma once
#include <vector>

#include "planner/holders.h"

namespace moetrain::planner {

class Hecate {
 public:
    explicit Hecate(const Cluster& cluster);

    // `overlap_degree` is how many experts' weights travel while the other layers compute. With t = min(overlap_degree,
    // E) and m = min(slots, t): if t <= m the t hottest experts go everywhere; else G m slots are shared among them in
    // proportion to load, nodes with more free slots first.
    void plan(const std::vector<double>& load_E, int32_t overlap_degree, Holders& holders);

 private:
    void share_slots(const std::vector<double>& load_E, int32_t num_hot, int32_t num_slots);
    bool place(int32_t expert, int32_t limit, Holders& holders);

    Cluster cluster_;
    std::vector<int32_t> hottest_;  // experts by load
    std::vector<int32_t> share_;    // replicas of each of them
    std::vector<int32_t> by_rest_;
    std::vector<int32_t> free_N_;
};

}  // namespace moetrain::planner
