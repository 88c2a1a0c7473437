// What the CUDA side of token rounding and of seats asks of the CPU's with debugging on.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL  // the operators of these tensors are registered already
#define TORCH_LIBRARY_IMPL(name, key, m) [[maybe_unused]] static void register_##name##_##key(torch::Library& m)
#include "ops/rounding/round_pairs_cpu.cpp"
#include "ops/routing/assign_seats_cpu.cpp"

namespace moetrain {

// As in ops/operators.cpp, which is not part of this library.
at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }
at::Tensor new_empty_like(const at::Tensor& like) { return at::empty_like(like); }
at::Tensor new_zeros(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::zeros(sizes, options); }

}  // namespace moetrain
