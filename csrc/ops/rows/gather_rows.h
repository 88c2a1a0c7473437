#pragma once
// gather_rows: y[n, :] = x[row[n], :] for n < offset[-1] (or all n without offset); later rows are left unwritten.
#include <ATen/core/Tensor.h>

#include "ops/common/optional.h"
#include "ops/common/row_checks.h"

namespace moetrain {

// The contract both backends share; throws on the first breach.
inline void check_gather_rows(const at::Tensor& x_TD, const at::Tensor& row_N, const OptionalTensor& offset_E1) {
    constexpr auto kOp = "gather_rows";
    check_rows(kOp, "x", "[T, D]", x_TD, 2);
    check_float(kOp, "x", x_TD);
    check_index(kOp, "row", "[N]", row_N, "x", x_TD);
    if (offset_E1) check_offset(kOp, *offset_E1, "x", x_TD);
}

// Reads values: the index tensors are on the CPU. Returns the true length of the list.
inline int64_t check_gather_rows_values(const at::Tensor& row_N, const OptionalTensor& offset_E1, int64_t num_rows) {
    constexpr auto kOp = "gather_rows";
    const int64_t length = offset_E1 ? check_offset_values(kOp, *offset_E1, row_N.size(0)) : row_N.size(0);
    check_id_values(kOp, "row", row_N, length, num_rows, "the number of rows of x");
    return length;
}

at::Tensor gather_rows_cpu(const at::Tensor& x_TD, const at::Tensor& row_N, const OptionalTensor& offset_E1);
at::Tensor gather_rows_cuda(const at::Tensor& x_TD, const at::Tensor& row_N, const OptionalTensor& offset_E1);

}  // namespace moetrain
