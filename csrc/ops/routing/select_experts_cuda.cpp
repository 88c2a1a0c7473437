#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "cuda/routing/select_experts.h"
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
void forward(const SelectOptions& o, const at::Tensor& logits_TE, const OptionalTensor& bias_E,
             const OptionalTensor& valid_T, const OptionalTensor& segment_T, const std::vector<at::Tensor>& out,
             const at::Tensor& breach) {
    const auto options = logits_TE.options();
    const auto stats_T2 = at::empty({o.num_tokens, 2}, out[1].options());
    const auto owner_T = at::empty({o.num_tokens}, options.dtype(at::kInt));
    const auto partial = at::empty({select_experts_partial_size(o)}, options.dtype(at::kDouble));
    const SelectForwardCuda<Acc> io{
        .logits_TE = logits_TE.const_data_ptr(),
        .dtype = element_of(logits_TE.scalar_type()),
        .row_stride = logits_TE.stride(0),
        .bias_E = data_or_null<Acc>(bias_E),
        .valid_T = data_or_null<bool>(valid_T),
        .segment_T = data_or_null<int32_t>(segment_T),
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
void backward(const SelectOptions& o, const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
              const at::Tensor& dweight, const OptionalTensor& place_TK, const at::Tensor& dprob_sum_GE,
              const OptionalTensor& valid_T, const OptionalTensor& segment_T, const at::Tensor& dlogits_TE) {
    const SelectBackwardCuda<Acc> io{
        .logits_TE = logits_TE.const_data_ptr(),
        .dtype = element_of(logits_TE.scalar_type()),
        .row_stride = logits_TE.stride(0),
        .expert_id_TK = expert_id_TK.const_data_ptr<int32_t>(),
        .dweight = dweight.const_data_ptr<Acc>(),
        .place_TK = data_or_null<int32_t>(place_TK),
        .dprob_sum_GE = dprob_sum_GE.const_data_ptr<Acc>(),
        .valid_T = data_or_null<bool>(valid_T),
        .segment_T = data_or_null<int32_t>(segment_T),
        .dlogits_TE = dlogits_TE.mutable_data_ptr(),
    };
    C10_CUDA_CHECK(launch_select_experts_backward(o, io, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_experts_cuda(
    const at::Tensor& logits_TE, int64_t top_k, std::string_view score, const OptionalTensor& bias_E, int64_t num_null,
    int64_t num_groups, int64_t groups_kept, std::string_view group_rule, bool renormalise, double scale,
    const OptionalTensor& valid_T, const OptionalTensor& segment_T, int64_t num_segments) {
    constexpr auto op = "select_experts";
    const SelectOptions o = check_select_experts(op, logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept,
                                                 group_rule, renormalise, scale, valid_T, segment_T, num_segments);
    const auto dtype = at_least_fp32(logits_TE.scalar_type());
    check_shared_memory(op, o, dtype);
    const c10::cuda::CUDAGuard guard(logits_TE.device());
    const auto bias = bias_E ? OptionalTensor(bias_E->to(dtype).contiguous()) : std::nullopt;
    const auto options = logits_TE.options();
    const std::vector<at::Tensor> out = {
        at::empty({o.num_tokens, top_k}, options.dtype(at::kInt)),
        at::empty({o.num_tokens, top_k}, options.dtype(dtype)),
        at::empty({num_segments, o.num_experts}, options.dtype(dtype)),
        at::zeros({num_segments, o.num_experts}, options.dtype(at::kLong)),
        at::zeros({1}, options.dtype(at::kInt)),
    };
    const auto breach = new_breach(logits_TE);
    const auto run = dtype == at::kDouble ? forward<double> : forward<float>;
    run(o, logits_TE, bias, valid_T, segment_T, out, breach);
    if (breach.defined()) {
        const auto token = breach.item<int64_t>();
        TORCH_CHECK_VALUE(token == kNoBreach, op, ": segments must be in [0, ", num_segments, "), got ",
                          (*segment_T)[token].item<int32_t>(), " at token ", token,
                          "; raise num_segments or mark the token not valid");
    }
    return {out[0], out[1], out[2], out[3], out[4]};
}

at::Tensor run_select_backward_cuda(const char* op, const SelectOptions& o, const at::Tensor& logits_TE,
                                    const at::Tensor& expert_id_TK, const at::Tensor& dweight,
                                    const OptionalTensor& place_TK, const at::Tensor& dprob_sum_GE,
                                    const OptionalTensor& valid_T, const OptionalTensor& segment_T) {
    check_shared_memory(op, o, dweight.scalar_type());
    const c10::cuda::CUDAGuard guard(logits_TE.device());
    auto dlogits_TE = at::empty(logits_TE.sizes(), logits_TE.options());
    const auto run = dweight.scalar_type() == at::kDouble ? backward<double> : backward<float>;
    run(o, logits_TE, expert_id_TK, dweight.contiguous(), place_TK, dprob_sum_GE.contiguous(), valid_T, segment_T,
        dlogits_TE);
    return dlogits_TE;
}

at::Tensor select_experts_backward_cuda(const at::Tensor& dweight_TK, const at::Tensor& dprob_sum_GE,
                                        const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
                                        std::string_view score, int64_t num_null, bool renormalise, double scale,
                                        const OptionalTensor& valid_T, const OptionalTensor& segment_T) {
    constexpr auto op = "select_experts_backward";
    const SelectOptions o = check_select_experts_backward(op, dweight_TK, dprob_sum_GE, logits_TE, expert_id_TK, score,
                                                          num_null, renormalise, scale, valid_T, segment_T);
    return run_select_backward_cuda(op, o, logits_TE, expert_id_TK, dweight_TK, std::nullopt, dprob_sum_GE, valid_T,
                                    segment_T);
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("select_experts", &select_experts_cuda);
    m.impl("select_experts_backward", &select_experts_backward_cuda);
}

}  // namespace moetrain
