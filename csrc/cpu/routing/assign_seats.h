#pragma once
#include <cstdint>

namespace moetrain {

// Pairs by expert, the seats of each expert, and where the tokens are. Seats ascend by expert, then by holder.
struct SeatProblem {
    const int32_t* token;        // [N]
    const int32_t* offset;       // [E + 1], of pairs
    const int32_t* seat_offset;  // [E + 1]
    const int32_t* holder;       // [Z]
    const int32_t* share;        // [Z]
    int64_t num_experts, num_tokens, num_groups;
    int64_t source, domain_size;
};

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
