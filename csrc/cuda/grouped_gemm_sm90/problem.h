#pragma once
#include <cstdint>

#include "cuda/common/bf16.h"

namespace moetrain::sm90 {

struct GroupedGemmProblem {
    const Bf16* a;                 // [num_a_rows, depth]
    const Bf16* b;                 // [num_slots, num_columns, depth]
    Bf16* out;                     // [rows, num_columns / Epilogue::kNumColumnBlocks]; written up to the last offset
    const int32_t* row_indices;    // rows of A; null: A's rows in order
    const int32_t* group_offsets;  // [num_groups + 1] on the device, ascending from 0
    const int32_t* slots;          // [num_groups], the slot of B of each group; null: group g has slot g
    int64_t num_a_rows;
    int64_t num_groups;
    int64_t num_slots;
    int64_t num_columns;
    int64_t depth;
};

}  // namespace moetrain::sm90
