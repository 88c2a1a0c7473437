#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace moetrain {

constexpr int64_t kMaxExpertsToGroup = 12000;  // a warp's counters must fit in shared memory

// int32 elements of scratch that launch_group_pairs needs.
int64_t group_pairs_scratch_size(int64_t num_pairs, int64_t num_experts);

// Stable counting sort of expert_id[num_pairs] into pair[num_pairs] and offset[num_experts + 1]; ids outside
// [0, num_experts) go to the tail. `breach`, if not null, holds 2^63 - 1 and gets the least position whose id is
// neither -1 nor an expert. num_experts is at most kMaxExpertsToGroup.
cudaError_t launch_group_pairs(const int32_t* expert_id, int64_t num_pairs, int64_t num_experts, int32_t* pair,
                               int32_t* offset, int32_t* scratch, int64_t* breach, cudaStream_t stream);

// What route says of its choices p = (token, k), of which choice p becomes the n-th pair.
template <typename Acc>
struct GroupedChoices {
    const Acc* weight_TK;
    int32_t top_k;
    int32_t* token_N;
    Acc* weight_N;
    int32_t* place_TK;  // the n of each p
};

// The same sort, of a router's choices: writes what `to` says instead of positions. Acc is float or double.
template <typename Acc>
cudaError_t launch_group_choices(const int32_t* expert_id_TK, int64_t num_pairs, int64_t num_experts,
                                 const GroupedChoices<Acc>& to, int32_t* offset, int32_t* scratch, cudaStream_t stream);

extern template cudaError_t launch_group_choices(const int32_t*, int64_t, int64_t, const GroupedChoices<float>&,
                                                 int32_t*, int32_t*, cudaStream_t);
extern template cudaError_t launch_group_choices(const int32_t*, int64_t, int64_t, const GroupedChoices<double>&,
                                                 int32_t*, int32_t*, cudaStream_t);

}  // namespace moetrain
