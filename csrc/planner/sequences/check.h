#pragma once
#include <string>

#include "planner/sequences/plan.h"

namespace moetrain::planner {

// The first rule that a plan breaks, in words; empty where it keeps all: every sequence is in one item, no rank holds
// more than its capacity, and the order rule holds (moetrain/sequence/plan.py).
std::string broken_rule(const SequencePlanView& plan);

}  // namespace moetrain::planner
