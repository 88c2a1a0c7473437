// What the kernels of sums.h take, for their callers.
#pragma once

#include <cstdint>

#include "cuda/common/bf16.h"

namespace moetrain::experts {

// out[t] = sum of y[pairs[i]] for i from row_begins[t] to row_begins[t + 1], in this order; 0 without pairs.
struct PairSumArguments {
    const Bf16* y;              // [N, D]
    const int32_t* row_begins;  // [R + 1]
    const int32_t* pairs;       // [N]
    Bf16* out;                  // [R, D]
    int num_rows;               // R
    int width;                  // D
};

// out[n] = sum of parts[i][n], i ascending, and <dy[row_indices[n]], bias of n's slot> where there is a bias; 0 beyond
// the last group.
struct WeightGradArguments {
    const float* parts;  // [num_parts, N]
    float* out;          // [N]
    int num_parts;
    int num_pairs;                 // N, a capacity
    const int32_t* group_offsets;  // [G + 1]
    int num_groups;                // G
    const Bf16* bias;              // [slots, D], slots bias_stride apart; null: none, and nothing below is used
    int64_t bias_stride;
    const int32_t* slots;  // null: group g has slot g
    const Bf16* dy;        // rows dy_stride apart
    int64_t dy_stride;
    const int32_t* row_indices;
    int width;  // D
};

// out[s] = sum over the rows r of slot s's groups of weight[r] * data[row_indices[r]], the gradient of a bias; 0
// without rows.
struct SlotSumArguments {
    const Bf16* data;  // rows data_stride apart
    int64_t data_stride;
    const int32_t* row_indices;  // null: r itself
    const float* weight;         // [R]; null: ones
    const int32_t* group_offsets;
    const int32_t* slot_offsets;  // as in VarlenKProblem
    const int32_t* slot_groups;
    Bf16* out;  // [slots, width]
    int num_slots;
    int width;
};

}  // namespace moetrain::experts
