// What the CUDA side of token rounding asks of the CPU's with debugging on.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL  // the operators of these tensors are registered already
#define TORCH_LIBRARY_IMPL(name, key, m) [[maybe_unused]] static void register_##name##_##key(torch::Library& m)
#include "ops/rounding/round_pairs_cpu.cpp"
