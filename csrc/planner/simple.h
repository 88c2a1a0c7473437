// Planners that look at no count.
#pragma once
#include "planner/holders.h"

namespace moetrain::planner {

// Every group holds all, and computes its own tokens.
void plan_full(const Cluster& cluster, Seats& seats);

// Any holders within the slots, any weights, any affinity: for tests. The same for the same key.
void plan_random(const Cluster& cluster, uint64_t key, Holders& holders, Seats& seats);

}  // namespace moetrain::planner
