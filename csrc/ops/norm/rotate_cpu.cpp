#include "cpu/norm/rotate.h"
#include "ops/common/tensors.h"
#include "ops/norm/rotate.h"

namespace moetrain {
namespace {

template <typename Acc>
void run(const at::Tensor& x_BSHd, const at::Tensor& cos_BSd, const at::Tensor& sin_BSd, bool inverse,
         const at::Tensor& y_BSHd) {
    rotate_kernel<Acc>({.x = x_BSHd.const_data_ptr(),
                        .dtype = x_BSHd.scalar_type(),
                        .num_batch = x_BSHd.size(0),
                        .length = x_BSHd.size(1),
                        .num_heads = x_BSHd.size(2),
                        .head_dim = x_BSHd.size(3),
                        .batch_stride = x_BSHd.stride(0),
                        .token_stride = x_BSHd.stride(1),
                        .head_stride = x_BSHd.stride(2),
                        .cos = cos_BSd.const_data_ptr<Acc>(),
                        .sin = sin_BSd.const_data_ptr<Acc>(),
                        .inverse = inverse,
                        .y = y_BSHd.mutable_data_ptr()});
}

}  // namespace

at::Tensor rotate_cpu(const at::Tensor& x_BSHd, const at::Tensor& cos_BSd, const at::Tensor& sin_BSd, bool inverse) {
    check_rotate(x_BSHd, cos_BSd, sin_BSd);
    auto y_BSHd = new_empty(x_BSHd.sizes(), x_BSHd.options());
    if (y_BSHd.numel() == 0) return y_BSHd;
    const auto turn = x_BSHd.scalar_type() == at::kDouble ? run<double> : run<float>;
    turn(x_BSHd, cos_BSd, sin_BSd, inverse, y_BSHd);
    return y_BSHd;
}

}  // namespace moetrain
