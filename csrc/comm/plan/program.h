// What one rank does in a sparse collective: copies and sums of chunks, and between them messages. Plain C++.
//
// A program has a stage per hop and a last one: copies, in their order; sums; then messages, at most one each way with
// a peer. What a stage receives may be read from the next stage on. Rows are chunks: offsets in elements follow from
// their length.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "comm/plan/routes.h"

namespace moetrain::comm {

enum class Buffer : int8_t {
    kOwned,     // the caller's owned chunks
    kHeld,      // the caller's held chunks
    kMessages,  // what was packed, and what was received and has no place of its own yet
    kWork,      // converted chunks that are not held; sums that are sent on or added to others
};
constexpr int kNumBuffers = 4;

struct Place {
    Buffer buffer;
    int32_t row;
};

// Rows of one buffer to rows of another.
struct Copies {
    Buffer from, to;
    std::vector<std::array<int32_t, 2>> rows;
};

// Neighbouring terms of one target row are one sum, in their order.
struct Term {
    int32_t to;
    Place from;
};
struct Sums {
    Buffer to;
    std::vector<Term> terms;
};

struct Message {
    int32_t peer;
    Buffer buffer;
    int32_t first, count;  // rows
};

struct Stage {
    std::vector<Copies> copies;
    Sums sums;
    std::vector<Message> receives, sends;
};
constexpr int kStages = kHops + 1;

struct Program {
    std::array<Stage, kStages> stages;
    int32_t num_messages = 0, num_work = 0;  // rows of these buffers
};

// Peers go round from this rank's neighbour, upwards for sends and downwards for receives, so that no rank is
// everybody's first. `converts`: the owned chunks have another type than the messages. A message that lies in one piece
// where it comes from, or belongs in one piece, is not copied; equal messages are packed once.
Program gather_program(const Routes& routes, const Viewpoint& from, int32_t num_ranks, bool converts);

// Terms ascend by rank inside a node and then by node, whoever owns or leads.
Program scatter_program(const Routes& routes, const Viewpoint& from, int32_t num_ranks, bool converts);

}  // namespace moetrain::comm
