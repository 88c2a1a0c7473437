#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/launch.h"

namespace moetrain {

// Strides are in elements; innermost dimensions are contiguous. Ids and offsets are valid: the caller vouches.
struct GroupedGemm {
    const void* a;          // [rows, inner], rows `a_stride` apart
    const void* b;          // [slots, cols, inner], or [slots, inner, cols] where b_is_kn
    void* c;                // [capacity, cols] contiguous
    const int32_t* offset;  // [num_groups + 1]
    const int32_t* slot;    // [num_groups], or null for group e in slot e
    const int32_t* row;     // [capacity], row of a that each row of c reads, or null for its own
    int64_t a_stride, b_slot_stride, b_row_stride;
    int64_t num_groups, capacity, inner, cols;
    bool b_is_kn;
};

// c[m, :] = a[row[m], :] @ b[slot of m's group]^T (@ b where b_is_kn) for m < offset[num_groups]; later rows are left
// unwritten. Accumulates in fp32 (fp64 for double).
cudaError_t launch_grouped_gemm(const GroupedGemm& args, Element type, cudaStream_t stream);

}  // namespace moetrain
