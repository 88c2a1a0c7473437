// What `plan_level` builds: islands of neighbouring blocks, their rounds, and who computes what in these.
#pragma once
#include <cstdint>
#include <vector>

#include "planner/sequences/problem.h"
#include "planner/sequences/widths.h"

namespace moetrain::planner {

constexpr int64_t kManyRanks = 512;  // on which less is tried

struct Gang {
    int32_t sequence;
    int64_t first, num_ranks;  // lanes of the island
};

struct Round {
    double ms = 0;
    std::vector<Gang> gangs;
    int64_t used = 0;  // lanes; those from here on have packs
    bool is_short = false;
};

struct Island {
    int64_t first, lanes;
    double left;
    std::vector<Round> rounds;
};

struct Bin {  // one lane in one round, which short sequences fill
    int32_t island, round;
    int64_t lane, tokens_left;
    double ms_left;
    std::vector<int32_t> members;
};

// One try at a plan that takes `limit` ms.
struct Attempt {
    const SequenceProblem& problem;
    Widths& widths;
    const std::vector<int32_t>& order;  // of sequences, the longest first
    int64_t block;                      // neighbouring ranks that share their rounds
    int64_t first_short;                // in `order`: sequences from here on need no gang
    double limit;
    double short_pack_ms;  // of a rank full of short sequences
    int64_t spare;         // blocks that a new island gets beyond those which its first sequence asks for
    std::vector<char> placed;
    std::vector<Island> islands;
    std::vector<Bin> bins;
};

// Places the long sequences, each with others of its length; false where they do not fit. See shelves.cpp.
bool place_long(Attempt& attempt);

// The same on one island of all ranks, in rounds of sequences that are alike; who has less than 1 / `part` of what a
// rank holds is left to be dealt out. See alike.cpp.
bool place_alike(Attempt& attempt, int64_t part);

// Deals the other sequences out to what is left of all islands. See deal.cpp.
void deal_short(Attempt& attempt);

}  // namespace moetrain::planner
