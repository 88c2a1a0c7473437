// How a source's pairs of one expert are divided over the expert's seats, for the host and the device. No torch header.
//
// An expert's n pairs, tokens ascending, are numbered i = 0, 1, ... Shares of sum S cut [0, n) at bound(A), A being the
// shares before a seat: n * A / S, rounded with an offset that differs between sources and experts, so that the pools'
// rounding errors do not add up on one seat. Where S = n, shares are the numbers of pairs themselves.
// Pair i stands at place i * stride mod n, stride being about n over the golden ratio and without a common divisor with
// n: any run of consecutive pairs is spread evenly over [0, n), so every block of tokens gets about its proportion of
// each seat, and all blocks together get each seat's number exactly.
#pragma once
#include <cstdint>

#include "common/select_experts_math.h"

namespace moetrain {

constexpr int64_t kSeatBlock = 256;          // tokens that share quotas: one thread's, or one warp's, work
constexpr int64_t kMaxShares = 1 << 24;      // of an expert's seats together
constexpr int64_t kMaxSeatTokens = 1 << 22;  // so that pairs * shares * 2^16 fits in 63 bits
constexpr int64_t kTurn = 1 << 16;

// Pairs by expert, the seats of each expert, and where the tokens are. Seats ascend by expert, then by holder.
struct SeatProblem {
    const int32_t* token;        // [N]
    const int32_t* offset;       // [E + 1], of pairs
    const int32_t* seat_offset;  // [E + 1]
    const int32_t* holder;       // [Z]
    const int32_t* share;        // [Z]
    int64_t num_experts, num_tokens, num_groups;
    int64_t source;
    int64_t near_begin, near_end;  // the groups of the source's domain

    MOETRAIN_HD int64_t num_blocks() const { return (num_tokens + kSeatBlock - 1) / kSeatBlock; }
    MOETRAIN_HD bool is_near(int32_t group) const { return group >= near_begin && group < near_end; }
};

// In [0, kTurn): the offset of `source`'s bounds for `expert`.
MOETRAIN_HD int64_t seat_turn(int64_t source, int64_t expert) {
    return (static_cast<uint32_t>(source) * 0x9E3779B1U + static_cast<uint32_t>(expert) * 0x85EBCA77U) >> 16;
}

// The first place of a seat before which the shares add up to `before` of `total`; n for all of them.
MOETRAIN_HD int64_t seat_bound(int64_t n, int64_t before, int64_t total, int64_t turn) {
    const int64_t scaled = n * before * kTurn - turn * total;
    return scaled <= 0 ? 0 : (scaled + total * kTurn - 1) / (total * kTurn);
}

MOETRAIN_HD int32_t common_divisor(int32_t a, int32_t b) {
    while (b != 0) {
        const int32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// See above; n is at least 1, and at most kMaxSeatTokens.
MOETRAIN_HD int32_t seat_stride(int32_t n) {
    const auto near = static_cast<int32_t>(int64_t{n} * 40503 / 65536);
    for (int32_t step = 0;; ++step) {
        if (common_divisor(near + step, n) == 1) return near + step;
        if (step <= near && common_divisor(near - step, n) == 1) return near - step;
    }
}

// Of the holders that a token's experts can go to, the one with the greatest key: more of its experts, then the own
// node, then the lower group.
struct SeatCandidate {
    static constexpr int64_t kHit = int64_t{2} << 32;  // what one more hit adds to the key
    int32_t hits;
    bool near;
    int32_t holder;

    MOETRAIN_HD int32_t rank() const { return 2 * hits + (near ? 1 : 0); }
    MOETRAIN_HD int64_t key() const { return (static_cast<int64_t>(rank()) << 32) | (INT32_MAX - holder); }
    static MOETRAIN_HD SeatCandidate of_key(int64_t key) {
        const auto rank = static_cast<int32_t>(key >> 32);
        return {rank / 2, rank % 2 != 0, INT32_MAX - static_cast<int32_t>(key & INT32_MAX)};
    }
};

}  // namespace moetrain
