#include <algorithm>
#include <limits>

#include "planner/sequences/planners.h"
#include "planner/sequences/widths.h"

namespace moetrain::planner {

double lower_bound_ms(const SequenceProblem& p) {
    if (p.num_sequences == 0) return 0;
    Widths widths(p, 1);
    double work = 0, longest = 0;
    for (int32_t i = 0; i < p.num_sequences; ++i)
        work += static_cast<double>(widths.least(i)) * widths.ms_of_least(i);
    const double ranks = static_cast<double>(p.num_ranks);
    double low = work / ranks;   // what the fewest ranks that hold each sequence take: less no plan does
    std::vector<int32_t> above;  // those that may need more
    for (int32_t i = 0; i < p.num_sequences; ++i) {
        if (widths.ms_of_least(i) <= low) continue;
        above.push_back(i);
        work -= static_cast<double>(widths.least(i)) * widths.ms_of_least(i);
        longest = std::max(longest, widths.ms(i, widths.most(i)));
    }
    low = std::max(low, longest);
    const auto fits = [&](double limit) {
        double sum = work;
        for (const int32_t i : above) {
            const int64_t d = widths.within(i, limit);
            if (d == 0) return false;
            sum += static_cast<double>(d) * widths.ms(i, d);
        }
        return sum <= limit * ranks;
    };
    if (fits(low)) return low;
    double high = 2 * low;
    while (!fits(high))
        high *= 2;
    for (int step = 0; step < 30; ++step) {
        const double middle = (low + high) / 2;
        (fits(middle) ? high : low) = middle;
    }
    return low;
}

}  // namespace moetrain::planner
