#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/routing/group_pairs.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/routing/group_pairs.h"

namespace moetrain {

std::tuple<at::Tensor, at::Tensor> group_pairs_cuda(const at::Tensor& expert_id_P, int64_t num_experts) {
    check_group_pairs(expert_id_P, num_experts);
    TORCH_CHECK_VALUE(num_experts <= kMaxExpertsToGroup, "group_pairs: num_experts must be at most ",
                      kMaxExpertsToGroup, " on CUDA, got ", num_experts);
    const c10::cuda::CUDAGuard guard(expert_id_P.device());
    const int64_t num_pairs = expert_id_P.size(0);
    auto pair_N = at::empty({num_pairs}, expert_id_P.options());
    auto offset_E1 = at::empty({num_experts + 1}, expert_id_P.options());
    const auto scratch = at::empty({group_pairs_scratch_size(num_pairs, num_experts)}, expert_id_P.options());
    const auto breach = new_breach(expert_id_P);
    C10_CUDA_CHECK(launch_group_pairs(expert_id_P.const_data_ptr<int32_t>(), num_pairs, num_experts,
                                      pair_N.mutable_data_ptr<int32_t>(), offset_E1.mutable_data_ptr<int32_t>(),
                                      scratch.mutable_data_ptr<int32_t>(), breach_data(breach),
                                      c10::cuda::getCurrentCUDAStream()));
    if (breach.defined()) {
        const auto bad = breach.item<int64_t>();
        TORCH_CHECK_VALUE(bad == kNoBreach, "group_pairs: expert ids must be -1 or in [0, ", num_experts, "), got ",
                          expert_id_P[bad].item<int32_t>(), " at position ", bad);
    }
    return {pair_N, offset_E1};
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) { m.impl("group_pairs", boxed::kernel<&group_pairs_cuda>()); }

}  // namespace moetrain
