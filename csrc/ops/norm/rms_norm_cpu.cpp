#include "cpu/norm/rms_norm.h"
#include "ops/common/tensors.h"
#include "ops/norm/rms_norm.h"

namespace moetrain {
namespace {

template <typename Acc>
void forward(const at::Tensor& x, const at::Tensor& weight_D, double eps, const at::Tensor& y,
             const at::Tensor& inv_rms) {
    rms_norm_kernel<Acc>({.x_RD = x.const_data_ptr(),
                          .dtype = x.scalar_type(),
                          .num_rows = inv_rms.numel(),
                          .width = x.size(-1),
                          .weight_D = weight_D.const_data_ptr<Acc>(),
                          .eps = static_cast<Acc>(eps),
                          .y_RD = y.mutable_data_ptr(),
                          .inv_rms_R = inv_rms.mutable_data_ptr<Acc>()});
}

template <typename Acc>
void backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight_D, const at::Tensor& inv_rms,
              const at::Tensor& dx, const at::Tensor& dweight_D) {
    rms_norm_backward_kernel<Acc>({.dy_RD = dy.const_data_ptr(),
                                   .x_RD = x.const_data_ptr(),
                                   .dtype = x.scalar_type(),
                                   .num_rows = inv_rms.numel(),
                                   .width = x.size(-1),
                                   .weight_D = weight_D.const_data_ptr<Acc>(),
                                   .inv_rms_R = inv_rms.const_data_ptr<Acc>(),
                                   .dx_RD = dx.mutable_data_ptr(),
                                   .dweight_D = dweight_D.mutable_data_ptr<Acc>()});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rms_norm_cpu(const at::Tensor& x, const at::Tensor& weight_D, double eps) {
    check_rms_norm(x, weight_D);
    const auto acc = at_least_fp32(x.scalar_type());
    auto y = new_empty(x.sizes(), x.options());
    auto inv_rms = new_empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(acc));
    const auto run = acc == at::kDouble ? forward<double> : forward<float>;
    run(x.contiguous(), weight_D.to(acc).contiguous(), eps, y, inv_rms);
    return {y, inv_rms};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
                                                         const at::Tensor& weight_D, const at::Tensor& inv_rms) {
    check_rms_norm_backward(dy, x, weight_D, inv_rms);
    const auto acc = at_least_fp32(x.scalar_type());
    auto dx = new_empty(x.sizes(), x.options());
    auto dweight_D = new_empty(weight_D.sizes(), weight_D.options().dtype(acc));
    const auto run = acc == at::kDouble ? backward<double> : backward<float>;
    run(dy.contiguous(), x.contiguous(), weight_D.to(acc).contiguous(), inv_rms.contiguous(), dx, dweight_D);
    return {dx, dweight_D.to(weight_D.scalar_type())};
}

}  // namespace moetrain
