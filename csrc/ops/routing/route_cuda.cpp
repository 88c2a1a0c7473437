// The kernels of select_experts, then a grouping of its choices that writes the pairs at once; nothing waits for the
// device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/routing/group_pairs.h"
#include "ops/common/boxed.h"
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

RouteOutputs route_cuda(const SelectInput& in) {
    const SelectOptions o = check_route(in);
    TORCH_CHECK_VALUE(o.num_true() <= kMaxExpertsToGroup, "route: the number of experts must be at most ",
                      kMaxExpertsToGroup, " on CUDA, got ", o.num_true());
    const auto [expert_id_TK, weight_TK, prob_sum_GE, count_GE, bad_1] = select_experts_cuda(in);
    const c10::cuda::CUDAGuard guard(in.logits_TE.device());
    const auto ints = expert_id_TK.options();
    auto token_N = at::empty({o.num_tokens * o.top_k}, ints);
    auto weight_N = at::empty({o.num_tokens * o.top_k}, weight_TK.options());
    auto offset_E1 = at::empty({o.num_true() + 1}, ints);
    auto place_TK = at::empty({o.num_tokens, o.top_k}, ints);
    const auto run = weight_TK.scalar_type() == at::kDouble ? group_choices<double> : group_choices<float>;
    run(o, expert_id_TK, weight_TK, token_N, weight_N, offset_E1, place_TK);
    return {token_N, weight_N, offset_E1, expert_id_TK, place_TK, prob_sum_GE, count_GE, bad_1};
}

at::Tensor route_backward_cuda(const SelectGradients& in, const at::Tensor& place_TK, const WeightOptions& how) {
    constexpr auto op = "route_backward";
    const SelectOptions o = check_route_backward(in, place_TK, how);
    if (debug_checks()) check_places(op, place_TK.cpu());
    return run_select_backward_cuda(op, o, in, place_TK, how.masks);
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("route", boxed::kernel<&route_cuda>());
    m.impl("route_backward", boxed::kernel<&route_backward_cuda>());
}

}  // namespace moetrain
