// New tensors and products of matrices, as torch makes them. torch's own headers for these (ATen/ops) take longer to
// compile than an operator's file; operators.cpp alone includes them.
#pragma once
#include <ATen/core/Tensor.h>

namespace moetrain {

// Values are whatever the memory held.
at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor new_empty_like(const at::Tensor& like);
at::Tensor new_zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// c = a b, for matrices.
void multiply_into(at::Tensor& c, const at::Tensor& a, const at::Tensor& b);

}  // namespace moetrain
