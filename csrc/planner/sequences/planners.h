#pragma once
#include <optional>
#include <string_view>

#include "planner/sequences/problem.h"

namespace moetrain::planner {

enum class SequencePlanner { kData, kContext, kByteScale, kMoetrain };
std::optional<SequencePlanner> sequence_planner_of(std::string_view name);

// The first sequence that a planner's gangs cannot hold, or -1.
int64_t too_long(const SequenceProblem& problem, SequencePlanner planner);

// A plan; nothing may be too long.
SequencePlanMade plan(const SequenceProblem& problem, SequencePlanner planner);

// No plan takes less: the least T for which the ranks have time enough if each sequence takes the fewest of them on
// which it is done in T.
double lower_bound_ms(const SequenceProblem& problem);

// Sets rounds of each rank and the makespan, from items and blocks: the most of what blocks that gangs join take, which
// is the sum over rounds of the longest item.
void finish(const SequenceProblem& problem, SequencePlanMade& made);

// Sequences, the longest first, of equal ones the earlier.
std::vector<int32_t> longest_first(const SequenceProblem& problem);

// Parts of `plan`, which give items; the lower bound is known.
void plan_in_order(const SequenceProblem& problem, int64_t gang, SequencePlanMade& made);
void plan_bytescale(const SequenceProblem& problem, SequencePlanMade& made);
void plan_level(const SequenceProblem& problem, SequencePlanMade& made);

}  // namespace moetrain::planner
