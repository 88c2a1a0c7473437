// Tensor-core kernels for bf16 with K and N multiples of 8, simple ones for the rest; the choice depends on dtype,
// sizes, strides and device alone, and nothing waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/grouped_gemm/simple/grouped_gemm.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/grouped_gemm/grouped_gemm.h"
#include "ops/grouped_gemm/tensor_core_cuda.h"

namespace moetrain {
namespace {

int64_t num_groups(const GroupedProduct& in) { return in.offset_E1.size(0) - 1; }

bool has_work(const GroupedProduct& in) {
    return in.capacity() > 0 && num_groups(in) > 0 && in.inner() > 0 && in.cols() > 0 && in.a_MK.size(0) > 0 &&
           in.b_SNK.size(0) > 0;
}

void check_values_if_debugging(const GroupedProduct& in) {
    if (!debug_checks()) return;
    GroupedProduct readable = in;
    readable.offset_E1 = in.offset_E1.cpu();
    readable.slot_E = on_cpu(in.slot_E);
    readable.row_M = on_cpu(in.row_M);
    check_grouped_gemm_values(readable);
}

// What tensor-core kernels need and do not get; rows of a are copied where they are not aligned.
std::string obstacle_to(const GroupedProduct& in) {
    if (auto obstacle = obstacle_to_dtype(in.a_MK); !obstacle.empty()) return obstacle;
    if (auto obstacle = obstacle_to_sizes("K and N", in.inner(), in.cols()); !obstacle.empty()) return obstacle;
    if (!is_aligned(in.b_SNK)) return c10::str("b at multiples of 16 bytes, got strides ", in.b_SNK.strides());
    return obstacle_to_sharing("b", in.b_SNK);
}

cudaError_t launch_on_tensor_cores(const TensorCoreKernels& kernels, const GroupedProduct& in, const at::Tensor& c_MN,
                                   cudaStream_t stream) {
    const auto a = aligned(in.a_MK);
    const gemm::GroupedGemmProblem problem{.a = bf16_data(a),
                                           .b = bf16_data(in.b_SNK),
                                           .row_indices = data_or_null<int32_t>(in.row_M),
                                           .group_offsets = in.offset_E1.const_data_ptr<int32_t>(),
                                           .slots = data_or_null<int32_t>(in.slot_E),
                                           .num_a_rows = a.size(0),
                                           .num_groups = num_groups(in),
                                           .num_slots = in.b_SNK.size(0),
                                           .num_columns = in.cols(),
                                           .depth = in.inner(),
                                           .a_stride = row_stride(a),
                                           .b_row_stride = row_stride(in.b_SNK),
                                           .b_slot_stride = in.b_SNK.size(0) > 1 ? in.b_SNK.stride(0) : 0};
    auto* launch = in.b_is_kn ? kernels.grouped_gemm_mn_major : kernels.grouped_gemm;
    return launch(problem, {.out = bf16_data(c_MN)}, attribute_of(a, cudaDevAttrMultiProcessorCount), stream);
}

cudaError_t launch_simple(const GroupedProduct& in, const at::Tensor& c_MN, cudaStream_t stream) {
    const GroupedGemm args{.a = in.a_MK.const_data_ptr(),
                           .b = in.b_SNK.const_data_ptr(),
                           .c = c_MN.mutable_data_ptr(),
                           .offset = in.offset_E1.const_data_ptr<int32_t>(),
                           .slot = data_or_null<int32_t>(in.slot_E),
                           .row = data_or_null<int32_t>(in.row_M),
                           .a_stride = row_stride(in.a_MK),
                           .b_slot_stride = in.b_SNK.stride(0),
                           .b_row_stride = row_stride(in.b_SNK),
                           .num_groups = num_groups(in),
                           .capacity = in.capacity(),
                           .inner = in.inner(),
                           .cols = in.cols(),
                           .b_is_kn = in.b_is_kn};
    return launch_grouped_gemm(args, element_of(in.a_MK.scalar_type()), stream);
}

}  // namespace

at::Tensor grouped_gemm_cuda(const GroupedProduct& in) {
    check_grouped_gemm(in);
    const c10::cuda::CUDAGuard guard(in.a_MK.device());
    check_values_if_debugging(in);
    auto c_MN = at::empty({in.capacity(), in.cols()}, in.a_MK.options());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const auto* kernels = has_work(in) ? choose_kernels_or_simple("grouped_gemm", in.a_MK, obstacle_to(in)) : nullptr;
    C10_CUDA_CHECK(kernels ? launch_on_tensor_cores(*kernels, in, c_MN, stream) : launch_simple(in, c_MN, stream));
    return c_MN;
}

std::string grouped_gemm_obstacle_cuda(const GroupedProduct& in) {
    check_grouped_gemm(in);
    return has_work(in) ? reason_for_simple_kernels(in.a_MK, obstacle_to(in)) : "";
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("grouped_gemm", boxed::kernel<&grouped_gemm_cuda>());
    m.impl("grouped_gemm_obstacle", boxed::kernel<&grouped_gemm_obstacle_cuda>());
}

}  // namespace moetrain
