#pragma once
// rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. x is [..., D]; any leading dimensions.
#include <ATen/core/Tensor.h>

#include <tuple>

#include "ops/common/checks.h"
#include "ops/common/row_checks.h"

namespace moetrain {

// The contract all backends share; throws on the first breach.
inline void check_rms_norm(const at::Tensor& x, const at::Tensor& weight_D) {
    constexpr auto kOp = "rms_norm";
    check_float(kOp, "x", x);
    check_float(kOp, "weight", weight_D);
    TORCH_CHECK_VALUE(x.dim() >= 1, kOp, ": x must be [..., D], got a scalar");
    TORCH_CHECK_VALUE(x.size(-1) >= 1, kOp, ": rows must have at least one element, got x of ", x.sizes());
    check_sizes(kOp, "weight", weight_D, {x.size(-1)}, "[D]");
    check_same_device(kOp, "weight", weight_D, "x", x);
}

inline void check_rms_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight_D,
                                    const at::Tensor& inv_rms) {
    constexpr auto kOp = "rms_norm_backward";
    check_rms_norm(x, weight_D);
    check_sizes(kOp, "dy", dy, x.sizes(), "of x's sizes");
    check_same_dtype(kOp, "dy", dy, "x", x);
    check_same_device(kOp, "dy", dy, "x", x);
    check_sizes(kOp, "inv_rms", inv_rms, x.sizes().slice(0, x.dim() - 1), "x's sizes but the last");
    check_dtype(kOp, "inv_rms", inv_rms, at_least_fp32(x.scalar_type()));
    check_same_device(kOp, "inv_rms", inv_rms, "x", x);
}

// y, and 1 / sqrt(mean(x^2) + eps) of each row in at least fp32.
std::tuple<at::Tensor, at::Tensor> rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight_D, double eps);
// Gradients of x and of the weight, each of its own dtype.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
                                                         const at::Tensor& weight_D, const at::Tensor& inv_rms);

}  // namespace moetrain
