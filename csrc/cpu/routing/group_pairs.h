#pragma once
#include <cstdint>

namespace moetrain {

// Fills pair[num_pairs] and offset[num_experts + 1]. Returns the first position whose id is outside
// [-1, num_experts), or -1 when all are inside; on a breach the outputs are left unfinished.
int64_t group_pairs_kernel(const int32_t* expert_id, int64_t num_pairs, int64_t num_experts, int32_t* pair,
                           int32_t* offset);

}  // namespace moetrain
