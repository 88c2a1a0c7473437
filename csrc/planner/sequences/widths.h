// How many ranks a sequence takes to be done in a given time.
#pragma once
#include <cstdint>
#include <vector>

#include "planner/sequences/problem.h"

namespace moetrain::planner {

// A sequence's time falls with its ranks until messages take longer than what they hide behind; beyond, no more are
// given.
class Widths {
 public:
    // `floor`: tokens of each rank that a gang may not fall below, unless memory asks for it.
    Widths(const SequenceProblem& problem, int64_t floor);

    int64_t least(int32_t i) const { return least_[i]; }
    double ms(int32_t i, int64_t d) const { return problem_.costs.ms(problem_.num_tokens[i], d); }
    double ms_of_least(int32_t i) const { return ms_of_least_[i]; }

    // The fewest ranks on which sequence i is done in `limit_ms`; 0 where there are none.
    int64_t within(int32_t i, double limit_ms);
    // The most ranks that are of use to it.
    int64_t most(int32_t i);

 private:
    const SequenceProblem& problem_;
    int64_t floor_;
    std::vector<int64_t> least_, most_;  // most: 0 where nobody has asked
    std::vector<double> ms_of_least_;
};

}  // namespace moetrain::planner
