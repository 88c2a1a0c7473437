// The kernels of select_experts, then a grouping of its choices that writes the pairs at once; nothing waits for the
// device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/routing/group_pairs.h"
#include "ops/common/cuda.h"
#include "ops/routing/route.h"

namespace moetrain {
namespace {

template <typename Acc>
void group_choices(const SelectOptions& o, const at::Tensor& expert_id_TK, const at::Tensor& weight_TK,
                   const at::Tensor& token_N, const at::Tensor& weight_N, const at::Tensor& offset_E1,
                   const at::Tensor& place_TK) {
    const int64_t num_pairs = expert_id_TK.numel();
    const auto scratch = at::empty({group_pairs_scratch_size(num_pairs, o.num_true())}, token_N.options());
    const GroupedChoices<Acc> to{
        .weight_TK = weight_TK.const_data_ptr<Acc>(),
        .top_k = static_cast<int32_t>(o.top_k),
        .token_N = token_N.mutable_data_ptr<int32_t>(),
        .weight_N = weight_N.mutable_data_ptr<Acc>(),
        .place_TK = place_TK.mutable_data_ptr<int32_t>(),
    };
    C10_CUDA_CHECK(launch_group_choices(expert_id_TK.const_data_ptr<int32_t>(), num_pairs, o.num_true(), to,
                                        offset_E1.mutable_data_ptr<int32_t>(), scratch.mutable_data_ptr<int32_t>(),
                                        c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

RouteOutputs route_cuda(const at::Tensor& logits_TE, int64_t top_k, std::string_view score,
                        const OptionalTensor& bias_E, int64_t num_null, int64_t num_groups, int64_t groups_kept,
                        std::string_view group_rule, bool renormalise, double scale, const OptionalTensor& valid_T,
                        const OptionalTensor& segment_T, int64_t num_segments) {
    const SelectOptions o = check_route(logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept, group_rule,
                                        renormalise, scale, valid_T, segment_T, num_segments);
    TORCH_CHECK_VALUE(o.num_true() <= kMaxExpertsToGroup, "route: the number of experts must be at most ",
                      kMaxExpertsToGroup, " on CUDA, got ", o.num_true());
    const auto [expert_id_TK, weight_TK, prob_sum_GE, count_GE, bad_1] =
        select_experts_cuda(logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept, group_rule, renormalise,
                            scale, valid_T, segment_T, num_segments);
    const c10::cuda::CUDAGuard guard(logits_TE.device());
    const auto ints = expert_id_TK.options();
    auto token_N = at::empty({o.num_tokens * top_k}, ints);
    auto weight_N = at::empty({o.num_tokens * top_k}, weight_TK.options());
    auto offset_E1 = at::empty({o.num_true() + 1}, ints);
    auto place_TK = at::empty({o.num_tokens, top_k}, ints);
    const auto run = weight_TK.scalar_type() == at::kDouble ? group_choices<double> : group_choices<float>;
    run(o, expert_id_TK, weight_TK, token_N, weight_N, offset_E1, place_TK);
    return {token_N, weight_N, offset_E1, expert_id_TK, place_TK, prob_sum_GE, count_GE, bad_1};
}

at::Tensor route_backward_cuda(const at::Tensor& dweight_N, const at::Tensor& dprob_sum_GE, const at::Tensor& logits_TE,
                               const at::Tensor& expert_id_TK, const at::Tensor& place_TK, std::string_view score,
                               int64_t num_null, bool renormalise, double scale, const OptionalTensor& valid_T,
                               const OptionalTensor& segment_T) {
    constexpr auto op = "route_backward";
    const SelectOptions o = check_route_backward(dweight_N, dprob_sum_GE, logits_TE, expert_id_TK, place_TK, score,
                                                 num_null, renormalise, scale, valid_T, segment_T);
    if (debug_checks()) check_places(op, place_TK.cpu());
    return run_select_backward_cuda(op, o, logits_TE, expert_id_TK, dweight_N, place_TK, dprob_sum_GE, valid_T,
                                    segment_T);
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("route", &route_cuda);
    m.impl("route_backward", &route_backward_cuda);
}

}  // namespace moetrain
