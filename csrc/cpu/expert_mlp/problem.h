// What the CPU kernels of expert_mlp work on: raw pointers and sizes, so that each instruction set's file needs no
// torch header. Shapes: R rows, D width, F hidden width, N pairs, S slots, E groups (experts).
#pragma once
#include <cstdint>

namespace moetrain::mlp {

enum class Activation : int8_t { kSwiglu, kGelu, kRelu2 };

// Columns of one packed panel of weights, whatever the instruction set. With gate and up rows a panel holds 32 of each
// (the same ones), so that one tile of a product has both; H is kept in this order of columns.
constexpr int64_t kPanel = 64;
// Rows past the end of a scratch matrix that a tile may read (and ignore).
constexpr int64_t kSlackRows = 32;
// Pairs of one step of a weight gradient, and columns of one task of it: what stays in a level 2 cache.
constexpr int64_t kPairsPerBlock = 768;
// Rows of y or dx that one task sums, at most.
constexpr int64_t kRowsPerTask = 2048;
constexpr int64_t kColumnsPerTask = 512;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Rows in memory, strides in elements; `slot` and `part` (gate, up) are 0 where there is no such dimension. The memory
// begins with row `first_row`.
struct Matrix {
    void* data = nullptr;
    int64_t slot_stride = 0, part_stride = 0, row_stride = 0, first_row = 0;
};

struct Problem {
    int64_t num_rows = 0, width = 0, hidden = 0, num_pairs = 0, num_groups = 0, num_slots = 0;
    Activation activation = Activation::kSwiglu;

    const int32_t* row = nullptr;     // [N]
    const void* weight = nullptr;     // [N], fp32 or fp64
    const int32_t* offset = nullptr;  // [E + 1]
    const int32_t* slot = nullptr;    // [E], or null where group e uses slot e
    // Groups of each slot, in ascending order: group_of_slot[slot_offset[s]] and on.
    const int32_t* slot_offset = nullptr;    // [S + 1]
    const int32_t* group_of_slot = nullptr;  // [E]
    int64_t most_pairs = 0;                  // of a slot
    bool rows_ascend = false;                // strictly, inside every group
    // The groups at work: the backward pass takes them in waves, so that what it needs per pair stays small.
    int64_t group_begin = 0, group_end = 0;

    Matrix x, y, dy, dx;                // [R, D]
    Matrix w_in, w_out, dw_in, dw_out;  // [S, parts, F, D] and [S, D, F]
    Matrix b_in, b_out, db_in, db_out;  // [S, parts, F] and [S, D]; a bias's row_stride is unused
    Matrix h, dh;                       // [N, hidden_columns]; dh may be h itself
    Matrix a;                           // [N, activated_columns]: weight * activation
    Matrix dx_sums;                     // [R, whole panels], fp32 or fp64: dx between waves; null where there is one
    void* dweight = nullptr;            // [N]

    bool gated() const { return activation == Activation::kSwiglu; }
    int64_t parts() const { return gated() ? 2 : 1; }
    // Hidden units per panel of w_in.
    int64_t units_per_panel() const { return kPanel / parts(); }
    int64_t hidden_panels() const { return gated() ? (hidden + 31) / 32 : (hidden + 63) / 64; }  // no division
    int64_t hidden_columns() const { return hidden_panels() * kPanel; }
    int64_t activated_columns() const { return hidden_panels() * units_per_panel(); }
    int64_t slot_of(int64_t group) const { return slot == nullptr ? group : slot[group]; }
};

// The work of one instruction set for one dtype, cut so that whoever runs a task, results are the same. `scratch` is
// the calling thread's own.
struct Kernels {
    int64_t (*scratch_bytes)(const Problem&);
    // H (where asked for) and weight * activation of pairs [begin, end) of a group.
    void (*up)(const Problem&, void* scratch, int64_t group, int64_t begin, int64_t end);
    // Columns [64 panel, 64 panel + 64) of rows [begin, end) of y, and of dx.
    void (*down)(const Problem&, void* scratch, int64_t begin, int64_t end, int64_t panel);
    void (*input_grad)(const Problem&, void* scratch, int64_t begin, int64_t end, int64_t panel);
    // dH, weight * activation and the weights' gradient of pairs [begin, end) of a group.
    void (*hidden_grad)(const Problem&, void* scratch, int64_t group, int64_t begin, int64_t end);
    // Columns [begin, end) of one slot's gradient, of w_in (of D) and w_out (of F).
    void (*w_in_grad)(const Problem&, void* scratch, int64_t slot, int64_t begin, int64_t end);
    void (*w_out_grad)(const Problem&, void* scratch, int64_t slot, int64_t begin, int64_t end);
};

}  // namespace moetrain::mlp
