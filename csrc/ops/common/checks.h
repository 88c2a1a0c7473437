// Checks that several operators share: each names the operator, the argument, what must hold and what came.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <limits>

namespace moetrain {

inline bool is_float(at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// What arithmetic is done in: at least float32, and float64 stays float64.
inline at::ScalarType at_least_fp32(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_float(const char* op, const char* name, const at::Tensor& x) {
    TORCH_CHECK_TYPE(is_float(x.scalar_type()), op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
                     x.scalar_type(), "; convert it with .to()");
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& x, at::ScalarType dtype) {
    TORCH_CHECK_TYPE(x.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", x.scalar_type(),
                     "; convert it with .to()");
}

// `legend` names the dimensions, as in "[T, E]".
inline void check_sizes(const char* op, const char* name, const at::Tensor& x, at::IntArrayRef sizes,
                        const char* legend) {
    TORCH_CHECK_VALUE(x.sizes() == sizes, op, ": ", name, " must be ", legend, " = ", sizes, ", got ", x.sizes());
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& x, const char* other_name,
                              const at::Tensor& other) {
    TORCH_CHECK_VALUE(x.device() == other.device(), op, ": ", name, " is on ", x.device(), " but ", other_name,
                      " is on ", other.device(), "; move one with .to()");
}

inline void check_contiguous(const char* op, const char* name, const at::Tensor& x) {
    TORCH_CHECK_VALUE(x.is_contiguous(), op, ": ", name, " must be contiguous, got sizes ", x.sizes(), " with strides ",
                      x.strides(), "; call .contiguous()");
}

// Rows may be apart, the elements of a row may not.
inline void check_contiguous_rows(const char* op, const char* name, const at::Tensor& x) {
    const bool whole_rows = x.numel() == 0 || x.size(-1) <= 1 || x.stride(-1) == 1;
    TORCH_CHECK_VALUE(whole_rows, op, ": the last dimension of ", name, " must have stride 1, got sizes ", x.sizes(),
                      " with strides ", x.strides(), "; call .contiguous()");
}

inline void check_fits_int32(const char* op, const char* what, int64_t value) {
    TORCH_CHECK_VALUE(value >= 0 && value <= std::numeric_limits<int32_t>::max(), op, ": ", what,
                      " must be between 0 and 2147483647, since positions are int32, got ", value);
}

}  // namespace moetrain
