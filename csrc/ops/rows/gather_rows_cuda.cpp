#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/rows/gather_rows.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/rows/gather_rows.h"

namespace moetrain {

at::Tensor gather_rows_cuda(const at::Tensor& x_TD, const at::Tensor& row_N, const OptionalTensor& offset_E1) {
    check_gather_rows(x_TD, row_N, offset_E1);
    const c10::cuda::CUDAGuard guard(x_TD.device());
    if (debug_checks()) check_gather_rows_values(row_N.cpu(), on_cpu(offset_E1), x_TD.size(0));

    auto y_ND = at::empty({row_N.size(0), x_TD.size(1)}, x_TD.options());
    const auto elem_bytes = static_cast<int64_t>(x_TD.element_size());
    C10_CUDA_CHECK(launch_gather_rows(x_TD.const_data_ptr(), row_stride(x_TD) * elem_bytes,
                                      row_N.const_data_ptr<int32_t>(), length_data(offset_E1), y_ND.mutable_data_ptr(),
                                      row_N.size(0), x_TD.size(1) * elem_bytes, c10::cuda::getCurrentCUDAStream()));
    return y_ND;
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) { m.impl("gather_rows", boxed::kernel<&gather_rows_cuda>()); }

}  // namespace moetrain
