#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/launch.h"

namespace moetrain {

// Strides are in elements; innermost dimensions are contiguous. Ids and offsets are valid: the caller vouches.
struct GroupedGemmVarlenK {
    const void* a;          // [rows, a_width], rows `a_stride` apart
    const void* b;          // [rows, b_width], rows `b_stride` apart
    void* out;              // [num_slots, a_width, b_width]
    const int32_t* offset;  // [num_groups + 1]
    const int32_t* slot;    // [num_groups], or null for group e in slot e
    const int32_t* row_a;   // [capacity], row of a for each summed row, or null for its own
    const int32_t* row_b;
    int64_t a_stride, b_stride, out_slot_stride, out_row_stride;
    int64_t num_groups, num_slots, a_width, b_width;
    bool out_is_wide;  // out is float though a and b are bf16 or fp16
    bool accumulate;   // add to out instead of setting it
};

// out[s] = (out[s] +) sum over groups of slot s, ascending, of a's rows^T b's rows. Slots without rows become zero, or
// keep their value. Accumulates in fp32 (fp64 for double).
cudaError_t launch_grouped_gemm_varlen_k(const GroupedGemmVarlenK& args, Element type, cudaStream_t stream);

}  // namespace moetrain
