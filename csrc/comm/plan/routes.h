// Who sends which expert chunk to whom, seen from one rank (Hecate, arXiv 2502.02581, section 4). Plain C++.
//
// Letters: E experts, S slices of a shard of an expert, G groups of `num_shards` ranks each, Z seats (an expert and a
// group that holds it). Pool rank = group * num_shards + shard. A chunk is one slice of one shard of one expert; chunks
// are numbered by (expert, shard, slice), and everything here ascends by that number.
//
// Chunks travel along edges of three kinds, weights forwards and gradients backwards:
//
//     inside    the owner to each other holder on its own node
//     across    the owner to one leader on each other node that has holders
//     fan-out   a leader to the other holders on its node
//
// The all-gather takes inside and across edges first and fan-out edges second; the reduce-scatter fan-out and inside
// edges first and across edges second. Where all ranks count as one node there are inside edges alone: that is the
// direct mode.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

namespace moetrain::comm {

constexpr int kHops = 2;
constexpr int32_t kNone = -1;

struct PlacementArrays {
    const int32_t* owner_ES;   // the group that owns each slice
    const int32_t* offset_E1;  // where each expert's seats begin in holder_Z
    const int32_t* holder_Z;   // groups that hold the expert, ascending
    int64_t num_experts, num_slices, num_groups, num_shards;

    int64_t num_ranks() const { return num_groups * num_shards; }
    int64_t num_chunks() const { return num_experts * num_shards * num_slices; }
};

// From which rank routes are seen, and how far its peers are.
struct Viewpoint {
    int32_t rank;
    int32_t ranks_per_node;  // num_ranks, or more, for the direct mode
    bool everywhere;         // every rank gets every chunk, whoever holds its expert
};

// A chunk that this rank owns or holds: its row among the owned and among the held ones, or kNone.
struct Chunk {
    int64_t id;
    int32_t owned, held;
};

// One end of an edge: the rank at the other end, and the position in `chunks`.
struct Edge {
    int32_t peer, chunk;
};

// What a leader or an owner adds up for one chunk, as positions in the lists of Routes:
// the contributions of its own node, ascending by rank, and where it owns the chunk the sums of other nodes, ascending.
struct Terms {
    int32_t chunk;
    int32_t inside_begin, inside_end;  // in inside_terms
    int32_t across_begin, across_end;  // in scatter_in[1]
    int32_t across_before;             // those of them whose nodes come before this one
};

struct Routes {
    std::vector<Chunk> chunks;
    int32_t num_owned = 0, num_held = 0;
    // By hop, in ascending order of chunks; of one chunk, in ascending order of ranks.
    std::array<std::vector<Edge>, kHops> gather_out, gather_in, scatter_out, scatter_in;
    // Of leaders and owners, ascending. A term is a position in scatter_in[0], or kNone for this rank's own chunk.
    std::vector<Terms> terms;
    std::vector<int32_t> inside_terms;
};

// The caller vouches for the arrays' values. A leader is the holder of its node that leads fewest chunks so far, the
// lowest rank where several do, so that each rank derives the same.
Routes derive_routes(const PlacementArrays& placement, const Viewpoint& from);

}  // namespace moetrain::comm
