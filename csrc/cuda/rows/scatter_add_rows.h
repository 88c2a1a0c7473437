#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/launch.h"

namespace moetrain {

struct ScatterAddRows {
    const void* y;  // [num_pairs, width], rows `y_stride` elements apart
    int64_t y_stride;
    const int32_t* row;     // [num_pairs], each in [0, num_rows): the caller vouches
    const void* weight;     // [num_pairs] float (double where y is), or null for ones
    const int32_t* length;  // the true number of pairs, or null where all count
    void* x;                // [num_rows, width] contiguous
    int64_t num_pairs, num_rows, width;
};

// int32 elements of scratch that the launch needs.
int64_t scatter_add_rows_scratch(int64_t num_pairs, int64_t num_rows);

// The pairs of each row: pair[row_begin[t]] up to pair[row_begin[t + 1]], ascending. Both lie in the scratch.
struct PairsByRow {
    const int32_t* row_begin;  // [num_rows + 1]
    const int32_t* pair;       // [num_pairs], the first *length
};

// Lists them, in scratch of scatter_add_rows_scratch elements. num_rows is at least 1; row and length as above.
cudaError_t launch_pairs_by_row(const int32_t* row, const int32_t* length, int64_t num_pairs, int64_t num_rows,
                                int32_t* scratch, PairsByRow* pairs, cudaStream_t stream);

// x[t, :] = sum of weight[n] * y[n, :] over n < *length with row[n] == t, n ascending; in fp32 (fp64 for double).
cudaError_t launch_scatter_add_rows(const ScatterAddRows& args, Element type, int32_t* scratch, cudaStream_t stream);

}  // namespace moetrain
