#pragma once
#include <cstdint>

#include "common/assign_seats_math.h"

namespace moetrain {

// What of a problem does not hold: `must`, what came instead, and where; without a fault `must` is null.
struct SeatFault {
    const char* must = nullptr;
    int64_t got = 0;
    int64_t expert = 0;
};

SeatFault first_seat_fault(const SeatProblem& in, int64_t num_pairs, int64_t num_seats);

// Fills the first offset[E] of seat_N: the seat of each pair. The problem must be without fault.
void assign_seats_kernel(const SeatProblem& in, int32_t* seat);

}  // namespace moetrain
