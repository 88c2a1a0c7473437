#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace moetrain {

constexpr int64_t kMaxExpertsToGroup = 12000;  // a warp's counters must fit in shared memory

// int32 elements of scratch that launch_group_pairs needs.
int64_t group_pairs_scratch_size(int64_t num_pairs, int64_t num_experts);

// Stable counting sort of expert_id[num_pairs] into pair[num_pairs] and offset[num_experts + 1]; ids outside
// [0, num_experts) go to the tail. `breach`, if not null, holds 2^63 - 1 and gets the least position whose id is
// neither -1 nor an expert. num_experts is at most kMaxExpertsToGroup. Never run on a GPU so far.
cudaError_t launch_group_pairs(const int32_t* expert_id, int64_t num_pairs, int64_t num_experts, int32_t* pair,
                               int32_t* offset, int32_t* scratch, int64_t* breach, cudaStream_t stream);

}  // namespace moetrain
