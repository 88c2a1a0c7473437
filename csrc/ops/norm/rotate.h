#pragma once
// rotate: element pairs (i, i + d/2) of each head turned by the angles of their token. Shapes: B rows of S tokens, H
// heads of d elements.
#include <ATen/core/Tensor.h>

#include "ops/common/checks.h"
#include "ops/common/row_checks.h"

namespace moetrain {

// The contract all backends share; throws on the first breach.
inline void check_rotate(const at::Tensor& x_BSHd, const at::Tensor& cos_BSd, const at::Tensor& sin_BSd) {
    constexpr auto kOp = "rotate";
    TORCH_CHECK_VALUE(x_BSHd.dim() == 4 && x_BSHd.size(3) % 2 == 0, kOp,
                      ": x must be [B, S, H, d] with an even d, got ", x_BSHd.sizes());
    check_float(kOp, "x", x_BSHd);
    check_contiguous_rows(kOp, "x", x_BSHd);
    const auto check_table = [&](const char* name, const at::Tensor& table_BSd) {
        check_sizes(kOp, name, table_BSd, {x_BSHd.size(0), x_BSHd.size(1), x_BSHd.size(3) / 2}, "[B, S, d / 2]");
        check_dtype(kOp, name, table_BSd, at_least_fp32(x_BSHd.scalar_type()));
        check_contiguous(kOp, name, table_BSd);
        check_same_device(kOp, name, table_BSd, "x", x_BSHd);
    };
    check_table("cos", cos_BSd);
    check_table("sin", sin_BSd);
}

// Turns by the angles, or with `inverse` by their negatives; the result is contiguous.
at::Tensor rotate_cpu(const at::Tensor& x_BSHd, const at::Tensor& cos_BSd, const at::Tensor& sin_BSd, bool inverse);

}  // namespace moetrain
