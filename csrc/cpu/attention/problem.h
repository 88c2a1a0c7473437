// What the CPU kernels of causal_attention work on: raw pointers and sizes, so that each instruction set's file needs
// no torch header. Shapes: B rows of S tokens, H query heads, G key heads (H / G query heads share one), d head size.
#pragma once
#include <cstdint>

namespace moetrain::attention {

// Queries and keys of one block of scores.
constexpr int64_t kQueries = 96;
constexpr int64_t kKeys = 64;
// Columns of a product with values: a head is narrower than a panel of 64.
constexpr int64_t kNarrow = 32;

// [B, S, heads, d] in memory, strides in elements; d is contiguous.
struct Heads {
    void* data = nullptr;
    int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

struct Problem {
    int64_t num_batch = 0, length = 0, num_heads = 0, num_key_heads = 0, head_dim = 0;
    double scale = 1;
    const int32_t* first = nullptr;  // [B, S], the first key that a query sees; it never falls within a row
    Heads q, k, v, y, dy, dq, dk, dv;
    void* lse = nullptr;  // [B, H, S], fp32 or fp64: log of a query's softmax denominator

    int64_t group() const { return num_heads / num_key_heads; }
    int64_t key_blocks() const { return (length + kKeys - 1) / kKeys; }
    int64_t value_panels() const { return (head_dim + kNarrow - 1) / kNarrow; }
};

// One row's heads that share a key head are one task, so that sums over queries have one order.
struct Kernels {
    int64_t (*scratch_bytes)(const Problem&);
    void (*forward)(const Problem&, void* scratch, int64_t batch, int64_t key_head);
    void (*backward)(const Problem&, void* scratch, int64_t batch, int64_t key_head);
};

}  // namespace moetrain::attention
