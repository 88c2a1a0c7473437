#pragma once
#include <ATen/core/Tensor.h>

#include "cpu/attention/problem.h"

namespace moetrain {

// [tokens, heads, d] as kernels read it; d is contiguous.
inline attention::Heads token_heads(const at::Tensor& x) {
    return {.data = x.data_ptr(), .token_stride = x.stride(0), .head_stride = x.stride(1)};
}

}  // namespace moetrain
