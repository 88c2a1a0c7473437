// A step's plan as arrays: which ranks compute which sequences together, and in which round. N sequences, I items, M
// ranks of all items, R ranks. Items are in the order of launching; see moetrain/sequence/plan.py.
#pragma once
#include <cstdint>

namespace moetrain::planner {

struct SequencePlanView {
    const int64_t* sequence_N3;  // id, tokens, loss tokens
    int64_t num_sequences;
    const int32_t* round_I;
    const int64_t* offset_I1;       // of each item's members
    const int32_t* member_N;        // rows of sequence_N3
    const int64_t* rank_offset_I1;  // of each item's ranks
    const int32_t* rank_M;          // ascending within an item
    const double *offload_I, *est_ms_I;
    int64_t num_items, num_item_ranks;
    const int32_t* rounds_R;  // that each rank runs
    int64_t num_ranks, block, capacity, num_layers;

    int64_t num_tokens(int64_t sequence) const { return sequence_N3[3 * sequence + 1]; }
};

// Tokens of a sequence of n that one of a gang of d ranks has: it is cut in 2d parts, of which the rank at `place` has
// an early and a late one (moetrain/sequence/zigzag.py).
inline int64_t share_of(int64_t n, int64_t d, int64_t place) {
    const auto part = [n, d](int64_t p) { return (p + 1) * n / (2 * d) - p * n / (2 * d); };
    return part(place) + part(2 * d - 1 - place);
}

// What a rank keeps of n tokens' activations, in tokens, where a share `offload` of them waits on the host, all but
// those of the two layers that compute and copy (ByteScale, arXiv 2502.21231, section 5.1).
inline double kept_tokens(int64_t n, double offload, int64_t num_layers) {
    if (num_layers <= 2) return static_cast<double>(n);
    const double layers = static_cast<double>(num_layers);
    return static_cast<double>(n) * (2 + (1 - offload) * (layers - 2)) / layers;
}

}  // namespace moetrain::planner
