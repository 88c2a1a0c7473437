#pragma once
// scatter_add_rows: x[t, :] = sum over n < offset[-1] with row[n] == t of weight[n] * y[n, :], n ascending.
// The sum runs in at least fp32 and is rounded once to y's dtype; rows that nothing names are zero.
#include <ATen/core/Tensor.h>

#include "ops/common/optional.h"
#include "ops/common/row_checks.h"

namespace moetrain {

// The contract both backends share; throws on the first breach.
inline void check_scatter_add_rows(const at::Tensor& y_ND, const at::Tensor& row_N, const OptionalTensor& weight_N,
                                   const OptionalTensor& offset_E1, int64_t num_rows) {
    constexpr auto kOp = "scatter_add_rows";
    check_rows(kOp, "y", "[N, D]", y_ND, 2);
    check_float(kOp, "y", y_ND);
    check_index(kOp, "row", "[N]", row_N, "y", y_ND);
    TORCH_CHECK_VALUE(row_N.size(0) == y_ND.size(0), kOp, ": row must have one entry per row of y (", y_ND.size(0),
                      "), got ", row_N.size(0));
    TORCH_CHECK_VALUE(num_rows >= 0, kOp, ": num_rows must be at least 0, got ", num_rows);
    if (weight_N) {
        const auto dtype = at_least_fp32(y_ND.scalar_type());
        TORCH_CHECK_VALUE(weight_N->dim() == 1 && weight_N->size(0) == y_ND.size(0), kOp,
                          ": weight must have one entry per row of y (", y_ND.size(0), "), got ", weight_N->sizes());
        TORCH_CHECK_TYPE(weight_N->scalar_type() == dtype, kOp, ": weight must be ", dtype, " where y is ",
                         y_ND.scalar_type(), ", got ", weight_N->scalar_type(), "; convert it with .to()");
        check_contiguous(kOp, "weight", *weight_N);
        check_same_device(kOp, "weight", *weight_N, "y", y_ND);
    }
    if (offset_E1) check_offset(kOp, *offset_E1, "y", y_ND);
}

// Reads values: the index tensors are on the CPU. Returns the true length of the list.
inline int64_t check_scatter_add_rows_values(const at::Tensor& row_N, const OptionalTensor& offset_E1,
                                             int64_t num_rows) {
    constexpr auto kOp = "scatter_add_rows";
    const int64_t length = offset_E1 ? check_offset_values(kOp, *offset_E1, row_N.size(0)) : row_N.size(0);
    check_id_values(kOp, "row", row_N, length, num_rows, "num_rows");
    return length;
}

at::Tensor scatter_add_rows_cpu(const at::Tensor& y_ND, const at::Tensor& row_N, const OptionalTensor& weight_N,
                                const OptionalTensor& offset_E1, int64_t num_rows);
at::Tensor scatter_add_rows_cuda(const at::Tensor& y_ND, const at::Tensor& row_N, const OptionalTensor& weight_N,
                                 const OptionalTensor& offset_E1, int64_t num_rows);

}  // namespace moetrain
