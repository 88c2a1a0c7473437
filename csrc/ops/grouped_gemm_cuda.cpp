// Never run on a GPU so far.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../cuda/grouped_gemm.h"
#include "grouped_gemm.h"
#include "rows_common_cuda.h"

namespace moetrain {

at::Tensor grouped_gemm_cuda(const at::Tensor& a_MK, const at::Tensor& b_SNK, const at::Tensor& offset_E1,
                             const std::optional<at::Tensor>& slot_E, const std::optional<at::Tensor>& row_M,
                             bool b_is_kn) {
    check_grouped_gemm(a_MK, b_SNK, offset_E1, slot_E, row_M, b_is_kn);
    const c10::cuda::CUDAGuard guard(a_MK.device());
    if (debug_checks()) check_grouped_gemm_values(a_MK, b_SNK, offset_E1.cpu(), on_cpu(slot_E), on_cpu(row_M));

    const int64_t capacity = row_M ? row_M->size(0) : a_MK.size(0);
    const int64_t cols = b_SNK.size(b_is_kn ? 2 : 1);
    auto c_MN = at::empty({capacity, cols}, a_MK.options());
    const GroupedGemm args{.a = a_MK.const_data_ptr(),
                           .b = b_SNK.const_data_ptr(),
                           .c = c_MN.mutable_data_ptr(),
                           .offset = offset_E1.const_data_ptr<int32_t>(),
                           .slot = index_data(slot_E),
                           .row = index_data(row_M),
                           .a_stride = row_stride(a_MK),
                           .b_slot_stride = b_SNK.stride(0),
                           .b_row_stride = row_stride(b_SNK),
                           .num_groups = offset_E1.size(0) - 1,
                           .capacity = capacity,
                           .inner = a_MK.size(1),
                           .cols = cols,
                           .b_is_kn = b_is_kn};
    C10_CUDA_CHECK(launch_grouped_gemm(args, element_of(a_MK.scalar_type()), c10::cuda::getCurrentCUDAStream()));
    return c_MN;
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) { m.impl("grouped_gemm", &grouped_gemm_cuda); }

}  // namespace moetrain
