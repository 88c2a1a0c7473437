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

// In [0, kTurn): the offset of `source`'s bounds for `expert`.
MOETRAIN_HD int64_t seat_turn(int64_t source, int64_t expert) {
    return (static_cast<uint32_t>(source) * 0x9E3779B1U + static_cast<uint32_t>(expert) * 0x85EBCA77U) >> 16;
}

// The first place of a seat before which the shares add up to `before` of `total`; n for all of them.
MOETRAIN_HD int64_t seat_bound(int64_t n, int64_t before, int64_t total, int64_t turn) {
    const int64_t scaled = n * before * kTurn - turn * total;
    return scaled <= 0 ? 0 : (scaled + total * kTurn - 1) / (total * kTurn);
}

MOETRAIN_HD int64_t common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

// See above; n is at least 1.
MOETRAIN_HD int64_t seat_stride(int64_t n) {
    const int64_t near = n * 40503 / 65536;
    for (int64_t step = 0;; ++step) {
        if (common_divisor(near + step, n) == 1) return near + step;
        if (step <= near && common_divisor(near - step, n) == 1) return near - step;
    }
}

// Which of two holders a token's experts go to: more of its experts, then the own node, then the lower group.
struct SeatCandidate {
    int32_t hits;
    bool near;
    int32_t holder;

    MOETRAIN_HD bool beats(const SeatCandidate& other) const {
        if (hits != other.hits) return hits > other.hits;
        if (near != other.near) return near;
        return holder < other.holder;
    }
};

}  // namespace moetrain
