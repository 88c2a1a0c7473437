#include <algorithm>

#include "planner/sequences/planners.h"
#include "planner/sequences/widths.h"

namespace moetrain::planner {

// Ranks share the work of all sequences, at best without a message, and none is done before its own ring is. What a
// message takes is no part of the work: sequences that share a gang share it too.
double lower_bound_ms(const SequenceProblem& p) {
    Widths widths(p, 1);
    double work = 0, longest = 0;
    for (int32_t i = 0; i < p.num_sequences; ++i) {
        work += p.costs.ms(p.num_tokens[i], 1);
        if (widths.ms_of_least(i) > longest) longest = std::max(longest, widths.ms(i, widths.most(i)));
    }
    return std::max(work / static_cast<double>(p.num_ranks), longest);
}

}  // namespace moetrain::planner
