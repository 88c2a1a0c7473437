#include "planner/sequences/widths.h"

#include <algorithm>

namespace moetrain::planner {

Widths::Widths(const SequenceProblem& problem, int64_t floor)
    : problem_(problem),
      floor_(floor),
      least_(problem.num_sequences),
      most_(problem.num_sequences, 0),
      ms_of_least_(problem.num_sequences) {
    for (int64_t i = 0; i < problem.num_sequences; ++i) {
        const int64_t n = problem.num_tokens[i];
        least_[i] = n <= problem.capacity ? 1 : least_ranks(n, problem.num_ranks, problem.capacity);
        ms_of_least_[i] = problem.costs.ms(n, least_[i]);
    }
}

int64_t Widths::most(int32_t i) {
    if (most_[i] != 0) return most_[i];
    // The time is convex in the ranks: the first of them that gains nothing over its next one.
    int64_t low = least_[i], high = problem_.num_ranks;
    if (floor_ > 1) high = std::max(low, std::min(high, problem_.num_tokens[i] / floor_));
    while (low < high) {
        const int64_t d = (low + high) / 2;
        if (ms(i, d + 1) < ms(i, d)) {
            low = d + 1;
        } else {
            high = d;
        }
    }
    return most_[i] = low;
}

int64_t Widths::within(int32_t i, double limit_ms) {
    if (ms_of_least_[i] <= limit_ms) return least_[i];
    int64_t low = least_[i], high = most(i);
    if (ms(i, high) > limit_ms) return 0;
    while (low + 1 < high) {  // not done on low, done on high
        const int64_t d = (low + high) / 2;
        (ms(i, d) <= limit_ms ? high : low) = d;
    }
    return high;
}

}  // namespace moetrain::planner
