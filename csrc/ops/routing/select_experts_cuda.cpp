#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "cuda/routing/select_experts.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/routing/select_experts.h"

namespace moetrain {
namespace {

void check_shared_memory(const char* op, const SelectOptions& o, at::ScalarType dtype) {
    const int64_t bytes = select_experts_shared_bytes(o, dtype == at::kDouble ? 8 : 4);
    TORCH_CHECK_VALUE(bytes <= kMaxSelectSharedBytes, op, ": a token needs ", bytes,
                      " bytes of shared memory on CUDA, of which there are ", kMaxSelectSharedBytes, "; ",
                      o.num_experts, " experts are too many");
}

template <typename Acc>
void forward(const SelectOptions& o, const SelectInput& in, const std::vector<at::Tensor>& out,
             const at::Tensor& breach) {
    const auto bias_E = in.bias_E ? OptionalTensor(in.bias_E->to(out[1].scalar_type()).contiguous()) : std::nullopt;
    const auto options = in.logits_TE.options();
    const auto stats_T2 = at::empty({o.num_tokens, 2}, out[1].options());
    const auto owner_T = at::empty({o.num_tokens}, options.dtype(at::kInt));
    const auto partial = at::empty({select_experts_partial_size(o)}, options.dtype(at::kDouble));
    const SelectForwardCuda<Acc> io{
        .logits_TE = in.logits_TE.const_data_ptr(),
        .dtype = element_of(in.logits_TE.scalar_type()),
        .row_stride = in.logits_TE.stride(0),
        .bias_E = data_or_null<Acc>(bias_E),
        .valid_T = data_or_null<bool>(in.masks.valid_T),
        .segment_T = data_or_null<int32_t>(in.masks.segment_T),
        .expert_id_TK = out[0].mutable_data_ptr<int32_t>(),
        .weight_TK = out[1].mutable_data_ptr<Acc>(),
        .prob_sum_GE = out[2].mutable_data_ptr<Acc>(),
        .count_GE = out[3].mutable_data_ptr<int64_t>(),
        .bad_1 = out[4].mutable_data_ptr<int32_t>(),
        .row_stats_T2 = stats_T2.mutable_data_ptr<Acc>(),
        .row_owner_T = owner_T.mutable_data_ptr<int32_t>(),
        .partial = partial.mutable_data_ptr<double>(),
        .breach = breach_data(breach),
    };
    C10_CUDA_CHECK(launch_select_experts(o, io, c10::cuda::getCurrentCUDAStream()));
}

template <typename Acc>
void backward(const SelectOptions& o, const SelectGradients& in, const OptionalTensor& place_TK,
              const TokenMasks& masks, const at::Tensor& dlogits_TE) {
    const auto dweight = in.dweight.contiguous();
    const auto dprob_sum_GE = in.dprob_sum_GE.contiguous();
    const SelectBackwardCuda<Acc> io{
        .logits_TE = in.logits_TE.const_data_ptr(),
        .dtype = element_of(in.logits_TE.scalar_type()),
        .row_stride = in.logits_TE.stride(0),
        .expert_id_TK = in.expert_id_TK.const_data_ptr<int32_t>(),
        .dweight = dweight.const_data_ptr<Acc>(),
        .place_TK = data_or_null<int32_t>(place_TK),
        .dprob_sum_GE = dprob_sum_GE.const_data_ptr<Acc>(),
        .valid_T = data_or_null<bool>(masks.valid_T),
        .segment_T = data_or_null<int32_t>(masks.segment_T),
        .dlogits_TE = dlogits_TE.mutable_data_ptr(),
    };
    C10_CUDA_CHECK(launch_select_experts_backward(o, io, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

SelectOutputs select_experts_cuda(const SelectInput& in) {
    constexpr auto op = "select_experts";
    const SelectOptions o = check_select_experts(op, in);
    const auto dtype = at_least_fp32(in.logits_TE.scalar_type());
    check_shared_memory(op, o, dtype);
    const c10::cuda::CUDAGuard guard(in.logits_TE.device());
    const auto options = in.logits_TE.options();
    const std::vector<at::Tensor> out = {
        at::empty({o.num_tokens, o.top_k}, options.dtype(at::kInt)),
        at::empty({o.num_tokens, o.top_k}, options.dtype(dtype)),
        at::empty({o.num_segments, o.num_experts}, options.dtype(dtype)),
        at::zeros({o.num_segments, o.num_experts}, options.dtype(at::kLong)),
        at::zeros({1}, options.dtype(at::kInt)),
    };
    const auto breach = new_breach(in.logits_TE);
    const auto run = dtype == at::kDouble ? forward<double> : forward<float>;
    run(o, in, out, breach);
    if (breach.defined()) {
        const auto token = breach.item<int64_t>();
        TORCH_CHECK_VALUE(token == kNoBreach, op, ": segments must be in [0, ", o.num_segments, "), got ",
                          (*in.masks.segment_T)[token].item<int32_t>(), " at token ", token,
                          "; raise num_segments or mark the token not valid");
    }
    return {out[0], out[1], out[2], out[3], out[4]};
}

at::Tensor run_select_backward_cuda(const char* op, const SelectOptions& o, const SelectGradients& in,
                                    const OptionalTensor& place_TK, const TokenMasks& masks) {
    check_shared_memory(op, o, in.dweight.scalar_type());
    const c10::cuda::CUDAGuard guard(in.logits_TE.device());
    auto dlogits_TE = at::empty(in.logits_TE.sizes(), in.logits_TE.options());
    const auto run = in.dweight.scalar_type() == at::kDouble ? backward<double> : backward<float>;
    run(o, in, place_TK, masks, dlogits_TE);
    return dlogits_TE;
}

at::Tensor select_experts_backward_cuda(const SelectGradients& in, const WeightOptions& how) {
    constexpr auto op = "select_experts_backward";
    const SelectOptions o = check_select_experts_backward(op, in, how);
    return run_select_backward_cuda(op, o, in, std::nullopt, how.masks);
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("select_experts", boxed::kernel<&select_experts_cuda>());
    m.impl("select_experts_backward", boxed::kernel<&select_experts_backward_cuda>());
}

}  // namespace moetrain
