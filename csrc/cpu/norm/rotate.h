#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace moetrain {

// x is [B, S, H, d] of any strides but the last, y is contiguous; the tables are [B, S, d / 2].
template <typename Acc>
struct Rotation {
    const void* x;
    at::ScalarType dtype;
    int64_t num_batch, length, num_heads, head_dim;
    int64_t batch_stride, token_stride, head_stride;
    const Acc *cos, *sin;
    bool inverse;  // by the negative angles
    void* y;
};

// Runs on torch's threads; defined for float and double.
template <typename Acc>
void rotate_kernel(const Rotation<Acc>& io);

}  // namespace moetrain
