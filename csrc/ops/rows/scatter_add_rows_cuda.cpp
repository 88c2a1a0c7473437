#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/rows/scatter_add_rows.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/rows/scatter_add_rows.h"

namespace moetrain {

at::Tensor scatter_add_rows_cuda(const at::Tensor& y_ND, const at::Tensor& row_N, const OptionalTensor& weight_N,
                                 const OptionalTensor& offset_E1, int64_t num_rows) {
    check_scatter_add_rows(y_ND, row_N, weight_N, offset_E1, num_rows);
    const c10::cuda::CUDAGuard guard(y_ND.device());
    if (debug_checks()) check_scatter_add_rows_values(row_N.cpu(), on_cpu(offset_E1), num_rows);

    auto x_TD = at::empty({num_rows, y_ND.size(1)}, y_ND.options());
    const auto scratch = at::empty({scatter_add_rows_scratch(row_N.size(0), num_rows)}, row_N.options());
    const ScatterAddRows args{.y = y_ND.const_data_ptr(),
                              .y_stride = row_stride(y_ND),
                              .row = row_N.const_data_ptr<int32_t>(),
                              .weight = weight_N ? weight_N->const_data_ptr() : nullptr,
                              .length = length_data(offset_E1),
                              .x = x_TD.mutable_data_ptr(),
                              .num_pairs = row_N.size(0),
                              .num_rows = num_rows,
                              .width = y_ND.size(1)};
    C10_CUDA_CHECK(launch_scatter_add_rows(args, element_of(y_ND.scalar_type()), scratch.mutable_data_ptr<int32_t>(),
                                           c10::cuda::getCurrentCUDAStream()));
    return x_TD;
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) { m.impl("scatter_add_rows", boxed::kernel<&scatter_add_rows_cuda>()); }

}  // namespace moetrain
