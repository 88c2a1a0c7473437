// Tensor-core kernels for bf16 with I and J multiples of 8, simple ones for the rest; the choice depends on dtype,
// sizes, strides and device alone, and nothing waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/grouped_gemm/simple/grouped_gemm_varlen_k.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/grouped_gemm/grouped_gemm_varlen_k.h"
#include "ops/grouped_gemm/tensor_core_cuda.h"

namespace moetrain {
namespace {

void check_values_if_debugging(const VarlenK& in, int64_t num_slots) {
    if (!debug_checks()) return;
    VarlenK readable = in;
    readable.offset_E1 = in.offset_E1.cpu();
    readable.slot_E = on_cpu(in.slot_E);
    readable.row_a_M = on_cpu(in.row_a_M);
    readable.row_b_M = on_cpu(in.row_b_M);
    check_varlen_k_values(readable, num_slots);
}

// What tensor-core kernels need and do not get; rows of a and b are copied where they are not aligned. `out_to_add_to`
// is null where the sums go to a tensor of their own.
std::string obstacle_to(const VarlenK& in, int64_t num_slots, const at::Tensor* out_to_add_to) {
    if (auto obstacle = obstacle_to_dtype(in.a_MI); !obstacle.empty()) return obstacle;
    if (auto obstacle = obstacle_to_sizes("I and J", in.a_MI.size(1), in.b_MJ.size(1)); !obstacle.empty())
        return obstacle;
    if (const auto* out_SIJ = out_to_add_to) {
        if (out_SIJ->scalar_type() != at::kFloat) return c10::str("Float to add to, got BFloat16");
        if (!out_SIJ->is_contiguous() || !is_aligned_address(*out_SIJ))
            return c10::str("an out without gaps at a multiple of 16 bytes, got strides ", out_SIJ->strides());
    }
    return obstacle_to_slots(in.slot_E, num_slots, in.a_MI.size(1));
}

bool has_work(const VarlenK& in, int64_t num_slots) {
    return num_slots > 0 && in.a_MI.numel() > 0 && in.b_MJ.numel() > 0 && in.capacity() > 0 && in.offset_E1.size(0) > 1;
}

cudaError_t launch_on_tensor_cores(const TensorCoreKernels& kernels, const VarlenK& in, const at::Tensor& out_SIJ,
                                   bool accumulate, cudaStream_t stream) {
    const auto a = aligned(in.a_MI);
    const auto b = aligned(in.b_MJ);
    const int64_t num_slots = out_SIJ.size(0);
    const SlotLists lists(in.slot_E, num_slots, stream);
    const gemm::VarlenKProblem problem{.a = varlen_k_operand(a, data_or_null<int32_t>(in.row_a_M)),
                                       .b = varlen_k_operand(b, data_or_null<int32_t>(in.row_b_M)),
                                       .group_offsets = in.offset_E1.const_data_ptr<int32_t>(),
                                       .slot_offsets = lists.offsets(),
                                       .slot_groups = lists.groups(),
                                       .num_slots = num_slots};
    const int num_blocks = attribute_of(a, cudaDevAttrMultiProcessorCount);
    if (out_SIJ.scalar_type() == at::kBFloat16)
        return kernels.varlen_k_gemm(problem, bf16_data(out_SIJ), num_blocks, stream);
    return kernels.varlen_k_gemm_float(problem, out_SIJ.mutable_data_ptr<float>(), accumulate, num_blocks, stream);
}

cudaError_t launch_simple(const VarlenK& in, const at::Tensor& out_SIJ, bool accumulate, cudaStream_t stream) {
    const GroupedGemmVarlenK args{.a = in.a_MI.const_data_ptr(),
                                  .b = in.b_MJ.const_data_ptr(),
                                  .out = out_SIJ.mutable_data_ptr(),
                                  .offset = in.offset_E1.const_data_ptr<int32_t>(),
                                  .slot = data_or_null<int32_t>(in.slot_E),
                                  .row_a = data_or_null<int32_t>(in.row_a_M),
                                  .row_b = data_or_null<int32_t>(in.row_b_M),
                                  .a_stride = row_stride(in.a_MI),
                                  .b_stride = row_stride(in.b_MJ),
                                  .out_slot_stride = out_SIJ.stride(0),
                                  .out_row_stride = row_stride(out_SIJ),
                                  .num_groups = in.offset_E1.size(0) - 1,
                                  .num_slots = out_SIJ.size(0),
                                  .a_width = in.a_MI.size(1),
                                  .b_width = in.b_MJ.size(1),
                                  .out_is_wide = out_SIJ.scalar_type() != in.a_MI.scalar_type(),
                                  .accumulate = accumulate};
    return launch_grouped_gemm_varlen_k(args, element_of(in.a_MI.scalar_type()), stream);
}

void launch_into(const VarlenK& in, const at::Tensor& out_SIJ, bool accumulate) {
    const c10::cuda::CUDAGuard guard(in.a_MI.device());
    const int64_t num_slots = out_SIJ.size(0);
    check_values_if_debugging(in, num_slots);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const TensorCoreKernels* kernels = nullptr;
    if (has_work(in, num_slots)) {
        auto obstacle = obstacle_to(in, num_slots, accumulate ? &out_SIJ : nullptr);
        kernels = choose_kernels_or_simple("grouped_gemm_varlen_k", in.a_MI, std::move(obstacle));
    }
    C10_CUDA_CHECK(kernels ? launch_on_tensor_cores(*kernels, in, out_SIJ, accumulate, stream)
                           : launch_simple(in, out_SIJ, accumulate, stream));
}

}  // namespace

at::Tensor grouped_gemm_varlen_k_cuda(const VarlenK& in, int64_t num_slots) {
    check_varlen_k(in, num_slots);
    auto out_SIJ = at::empty({num_slots, in.a_MI.size(1), in.b_MJ.size(1)}, in.a_MI.options());
    launch_into(in, out_SIJ, /*accumulate=*/false);
    return out_SIJ;
}

void grouped_gemm_varlen_k_accumulate_cuda(at::Tensor& out_SIJ, const VarlenK& in) {
    check_varlen_k_out(out_SIJ, in);
    launch_into(in, out_SIJ, /*accumulate=*/true);
}

std::string grouped_gemm_varlen_k_obstacle_cuda(const VarlenK& in, int64_t num_slots, const OptionalTensor& out_SIJ) {
    check_varlen_k(in, num_slots);
    if (!has_work(in, num_slots)) return "";
    return reason_for_simple_kernels(in.a_MI, obstacle_to(in, num_slots, out_SIJ ? &*out_SIJ : nullptr));
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("grouped_gemm_varlen_k", boxed::kernel<&grouped_gemm_varlen_k_cuda>());
    m.impl("grouped_gemm_varlen_k_", boxed::kernel<&grouped_gemm_varlen_k_accumulate_cuda>());
    m.impl("grouped_gemm_varlen_k_obstacle", boxed::kernel<&grouped_gemm_varlen_k_obstacle_cuda>());
}

}  // namespace moetrain
