// Whole numbers for the weights of seats.
#pragma once
#include "planner/problem.h"

namespace moetrain::planner {

// Scales the weights of each expert's holders so that its shares sum to nearly kMostShares where they are most.
void quantise(const std::vector<float>& weight_G, Affinity affinity, Seats& seats);

// Every seat alike, for every source.
void weigh_evenly(Seats& seats);

}  // namespace moetrain::planner
