#include "planner/weights.h"

#include <algorithm>

namespace moetrain::planner {

void quantise(const std::vector<float>& weight_G, Affinity affinity, Seats& seats) {
    const int32_t highest = std::max({affinity.home, affinity.near, affinity.far});
    seats.affinity = affinity;
    seats.weight_Z.resize(seats.holder_Z.size());
    for (size_t e = 0; e + 1 < seats.offset_E1.size(); ++e) {
        const int32_t begin = seats.offset_E1[e], end = seats.offset_E1[e + 1];
        double sum = 0;
        for (int32_t z = begin; z < end; ++z)
            sum += weight_G[seats.holder_Z[z]];
        // Rounding adds at most a half to each.
        const double room = static_cast<double>(kMostShares / highest) - 0.5 * (end - begin);
        for (int32_t z = begin; z < end; ++z) {
            const double part = weight_G[seats.holder_Z[z]] / sum;
            seats.weight_Z[z] = static_cast<int32_t>(part * room + 0.5);
        }
    }
}

void weigh_evenly(Seats& seats) {
    seats.affinity = {1, 1, 1};
    seats.weight_Z.assign(seats.holder_Z.size(), 1);
}

}  // namespace moetrain::planner
