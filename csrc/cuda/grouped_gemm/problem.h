// What a grouped GEMM computes, for its callers: sizes, strides and pointers.
#pragma once
#include <cstdint>

#include "cuda/common/bf16.h"

namespace moetrain::gemm {

// C[r] = A[r] · B[slot of r's group]ᵀ, rows sorted by group. Strides are in elements, multiples of 8; addresses are
// multiples of 16 bytes.
struct GroupedGemmProblem {
    const Bf16* a = nullptr;  // [num_a_rows, depth], rows `a_stride` apart
    const Bf16* b = nullptr;  // [num_slots, num_columns, depth], or [num_slots, depth, num_columns] if MN-major
    const int32_t* row_indices = nullptr;    // rows of A; null: A's rows in order
    const int32_t* group_offsets = nullptr;  // [num_groups + 1] on the device, ascending from 0
    const int32_t* slots = nullptr;          // [num_groups], the slot of B of each group; null: group g has slot g
    int64_t num_a_rows = 0;
    int64_t num_groups = 0;
    int64_t num_slots = 0;
    int64_t num_columns = 0;
    int64_t depth = 0;
    int64_t a_stride = 0;       // 0: rows without gaps
    int64_t b_row_stride = 0;   // likewise
    int64_t b_slot_stride = 0;  // likewise
};

// What the rows of a product become: stored in `out` [rows, num_columns], after adding weight of the row * bias of the
// slot where there is a bias. Same fields as StoreEpilogue's.
struct RowStore {
    Bf16* out;
    const Bf16* bias = nullptr;  // [slots, num_columns], slots bias_stride elements apart, multiples of 8
    int64_t bias_stride = 0;
    const float* weight = nullptr;  // [rows]
};

// C[s] = sum over the rows r of slot s's groups of A[r]ᵀ · B[r]; a slot of no group, or of no rows, gives zeros.
struct VarlenKProblem {
    struct Operand {
        const Bf16* data;  // [num_rows, width], rows `stride` apart
        int64_t num_rows;
        int64_t width;
        int64_t stride = 0;                    // 0: rows without gaps
        const int32_t* row_indices = nullptr;  // row of `data` for each r; null: r itself
    };
    Operand a;
    Operand b;
    const int32_t* group_offsets = nullptr;  // [num_groups + 1] on the device, ascending from 0
    const int32_t* slot_offsets =
        nullptr;  // [num_slots + 1]: slot s has groups slot_groups[slot_offsets[s]] and on, ascending;
    const int32_t* slot_groups = nullptr;  // both null: slot s has group s
    int64_t num_slots = 0;
};

}  // namespace moetrain::gemm
