#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace moetrain {

// [R, D] in, [R, D] out, both contiguous and of one dtype. Acc is float, or double for float64 rows.
template <typename Acc>
struct RmsNormForward {
    const void* x_RD;
    at::ScalarType dtype;
    int64_t num_rows, width;
    const Acc* weight_D;
    Acc eps;
    void* y_RD;
    Acc* inv_rms_R;
};

template <typename Acc>
struct RmsNormBackward {
    const void* dy_RD;
    const void* x_RD;
    at::ScalarType dtype;
    int64_t num_rows, width;
    const Acc* weight_D;
    const Acc* inv_rms_R;
    void* dx_RD;
    Acc* dweight_D;
};

// Both run on torch's threads; defined for float and double.
template <typename Acc>
void rms_norm_kernel(const RmsNormForward<Acc>& io);
template <typename Acc>
void rms_norm_backward_kernel(const RmsNormBackward<Acc>& io);

}  // namespace moetrain
