// What the CPU kernels of causal_attention and attend work on: raw pointers and sizes, so that each instruction set's
// file needs no torch header. Shapes: T tokens in R rows, or Q queries and K keys in segments of any lengths; H query
// heads, G key heads (H / G query heads share one), d head size.
#pragma once
#include <cstdint>

namespace moetrain::attention {

// Queries and keys of one block of scores.
constexpr int64_t kQueries = 96;
constexpr int64_t kKeys = 64;
// Columns of a product with values: a head is narrower than a panel of 64.
constexpr int64_t kNarrow = 32;

// [tokens, heads, d] in memory, strides in elements; d is contiguous.
struct Heads {
    void* data = nullptr;
    int64_t token_stride = 0, head_stride = 0;
};

struct Problem {
    int64_t num_heads = 0, num_key_heads = 0, head_dim = 0;
    int64_t length = 0;     // T, or Q
    int64_t most_keys = 0;  // of a segment
    double scale = 1;
    // Segments are rows of packed documents, [R + 1] of where they begin, with the first token that each one sees,
    // which never falls within a row;
    const int32_t *offset = nullptr, *first = nullptr;
    // or they are ranges, [segments, 2] of queries and of keys, square where causal, else seen whole.
    const int32_t *range_q = nullptr, *range_k = nullptr;
    bool causal = true;
    Heads q, k, v, dy;
    // Of the type of q where segments are rows, and written; of sums where they are ranges: y and lse are then
    // continued, and gradients added to.
    Heads y, dq, dk, dv;
    void* lse = nullptr;  // [H, T] or [H, Q], fp32 or fp64: log of a query's softmax denominator

    bool continues() const { return range_q != nullptr; }
    int64_t group() const { return num_heads / num_key_heads; }
    int64_t key_blocks() const { return blocks_of(most_keys); }
    int64_t value_panels() const { return (head_dim + kNarrow - 1) / kNarrow; }
    static int64_t blocks_of(int64_t keys) { return (keys + kKeys - 1) / kKeys; }
};

// Queries and keys of one task. Causal segments are square: query i is the token of key i.
struct Segment {
    int64_t query, num_queries, key, num_keys;
    const int32_t* first;  // of each query the first token that it sees, or none
    bool causal;

    static Segment of(const Problem& p, int64_t i) {
        if (!p.continues()) {
            const int64_t begin = p.offset[i], size = p.offset[i + 1] - begin;
            return {begin, size, begin, size, p.first + begin, true};
        }
        const int32_t *const q = p.range_q + 2 * i, *const k = p.range_k + 2 * i;
        return {q[0], q[1] - q[0], k[0], k[1] - k[0], nullptr, p.causal};
    }
    int64_t first_key(int64_t i) const { return first ? first[i] - key : 0; }
    // The key behind the last one that one of the queries before `end` sees.
    int64_t end_key(int64_t end) const { return causal && end < num_keys ? end : num_keys; }
    int64_t num_blocks() const { return Problem::blocks_of(num_keys); }
};

// The heads of one segment that share a key head are one task, so that sums over queries have one order.
struct Kernels {
    int64_t (*scratch_bytes)(const Problem&);
    void (*forward)(const Problem&, void* scratch, int64_t segment, int64_t key_head);
    void (*backward)(const Problem&, void* scratch, int64_t segment, int64_t key_head);
};

}  // namespace moetrain::attention
